// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One usage line a guest. The guests print it, the library hands it out: written once, so that they cannot
//! differ.

/// `hello` and `hello-pie`.
pub(crate) const HELLO: &str = "hello";

/// `touch`.
pub(crate) const TOUCH: &str = "touch [--pages N] [--order asc|desc|random|stride:K] [--write PCT] \
                                [--pattern HEX] [--passes P] [--seed S] [--verify] [--time] [--prime] \
                                [--spin N]";

/// `compute`.
pub(crate) const COMPUTE: &str = "compute [--rounds N]";

/// `syscalls`.
pub(crate) const SYSCALLS: &str = "syscalls [--calls N]";

/// `threads`.
pub(crate) const THREADS: &str =
    "threads [--writers W] [--rounds R | --seconds S] [--pages N] [--seed S] [--stats]";

/// `race`.
pub(crate) const RACE: &str = "race exits|steps|spin [--threads N] [--iterations N] [--every N]";

/// `torture`.
pub(crate) const TORTURE: &str = "torture SEED[..LAST] [--ops N] [--pages N] [--trace]";

/// `attack`.
pub(crate) const ATTACK: &str = "attack list | NAME | raise SIGNAL";

/// `memstress`.
pub(crate) const MEMSTRESS: &str = "memstress [--threads N] [--pages N] [--overlap] [--write-percent PCT] \
                                    [--random] [--seed S] [--spin N] < COMMANDS";

/// `victim`.
pub(crate) const VICTIM: &str = "victim [--pages N] [--rounds R | --until fault|back] [--pause MS] [--grow N] \
                                 [--heap] [--where]";

/// `watcher`.
pub(crate) const WATCHER: &str = "watcher [--board HEX]";

/// `mix`.
pub(crate) const MIX: &str = "mix [--pages N] [--zero PCT] [--dup PCT] [--copies N] [--seed S] < COMMANDS";
