// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `umbra` command. See [`vmm::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main()
}
