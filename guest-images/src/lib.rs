// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Small static x86-64 Linux programs that exercise memory, embedded as ELF images.
//!
//! They are the guests that umbra ships. Each is an ordinary Linux program of a few kilobytes, `no_std`, without a C library,
//! built from `src/guests` by the build script with nothing but `rustc` and the system's linker. So each also runs natively,
//! and the native run is the oracle: what a guest prints on stdout and its exit status depend on its arguments alone (but for
//! `touch --time`, `compute`, `syscalls`, `victim --where`, and for answers of `memstress`: its times, the address that `where` tells, how many accesses
//! there were before `stop`, and the times of `mix`; and for whether `race` loses updates), never on addresses, times, scheduling
//! or what it runs on.
//!
//! | image | what it is for |
//! | --- | --- |
//! | `hello`, `hello-pie` | the first run: loading of both ELF types, stack, data, bss, heap and a mapping |
//! | `touch` | faults in a chosen order, to measure what one costs |
//! | `compute` | computing of several kinds, to compare engines and translators of instructions |
//! | `syscalls` | system calls, to measure what one costs |
//! | `threads` | the race for a stale translation, or a freed frame that is still within reach |
//! | `memstress` | threads that touch memory on command, so that what ages and tracks it can be checked and measured |
//! | `victim` | memory that fails while it is used: each signal, error and wrong byte is told (`umbra inject`) |
//! | `attack` | code that means harm: natively much of it works, so here umbra alone is right (tests/attack.rs) |
//! | `watcher` | mappings of umbra's own that are shown to a guest (`umbra run --adopt-demo`) |
//! | `mix` | memory of which so much is equal and so much is not, to see what page sharing makes of it |
//! | `race` | a planted bug: updates of a counter that are lost, if threads are interrupted at the wrong moment |
//! | `torture` | random memory system calls, each result and each byte read compared with a model |
//!
//! ```
//! let image = guest_images::find("hello").expect("hello is always there");
//! assert!(image.elf.starts_with(b"\x7fELF"));
//! for image in guest_images::all() {
//!     println!("{:10} {}", image.name, image.summary);
//! }
//! ```
//!
//! To run one natively: `cargo run -p guest-images -- touch --pages 64 --verify`.

use std::fmt;

mod usage;

/// A program, ready to be loaded.
#[derive(Clone, Copy)]
pub struct Image {
    /// What it is called, on umbra's command line too.
    pub name: &'static str,
    /// What it does, in one sentence without a full stop.
    pub summary: &'static str,
    /// Its command line in one line, starting with the program's name. `--help` prints it behind `usage: `.
    pub usage: &'static str,
    /// The ELF file: x86-64, statically linked, ET_EXEC or (static-pie) ET_DYN, no interpreter, no segment
    /// both writable and executable. It is aligned to 16 bytes, so that headers can be read in place.
    pub elf: &'static [u8],
}

/// Of the file it shows the length only.
impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, summary, usage, elf } = self;
        f.debug_struct("Image")
            .field("name", name)
            .field("summary", summary)
            .field("usage", usage)
            .field("elf", &format_args!("{} bytes", elf.len()))
            .finish()
    }
}

/// Every image, the simplest first.
pub fn all() -> &'static [Image] {
    &IMAGES
}

/// The image of that name, or `None`.
pub fn find(name: &str) -> Option<&'static Image> {
    IMAGES.iter().find(|image| image.name == name)
}

/// Bytes on a 16-byte boundary.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

/// The file that the build script made of a guest.
macro_rules! elf {
    ($name:literal) => {{
        static IMAGE: &Aligned<[u8]> =
            &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".elf")));
        &IMAGE.0
    }};
}

static IMAGES: [Image; 13] = [
    Image {
        name: "hello",
        summary: "greets and proves that stack, data, bss, heap and a mapping work",
        usage: usage::HELLO,
        elf: elf!("hello"),
    },
    Image {
        name: "hello-pie",
        summary: "the same program as a static-pie, which relocates itself",
        usage: usage::HELLO,
        elf: elf!("hello-pie"),
    },
    Image {
        name: "touch",
        summary: "touches pages in a chosen order, and tells what each cost",
        usage: usage::TOUCH,
        elf: elf!("touch"),
    },
    Image {
        name: "compute",
        summary: "computes in several ways, and tells how long each took",
        usage: usage::COMPUTE,
        elf: elf!("compute"),
    },
    Image {
        name: "syscalls",
        summary: "makes system calls many times, and tells how long they took",
        usage: usage::SYSCALLS,
        elf: elf!("syscalls"),
    },
    Image {
        name: "threads",
        summary: "writes from several threads to memory that is unmapped, protected and moved meanwhile",
        usage: usage::THREADS,
        elf: elf!("threads"),
    },
    Image {
        name: "torture",
        summary: "makes random memory system calls and compares all it sees with a model",
        usage: usage::TORTURE,
        elf: elf!("torture"),
    },
    Image {
        name: "memstress",
        summary: "touches pages from several threads, when a command on stdin says so",
        usage: usage::MEMSTRESS,
        elf: elf!("memstress"),
    },
    Image {
        name: "mix",
        summary: "holds pages of which some are equal, rewrites them on command, and knows what must be in them",
        usage: usage::MIX,
        elf: elf!("mix"),
    },
    Image {
        name: "race",
        summary: "loses updates of a counter now and then, so that a search has something to find",
        usage: usage::RACE,
        elf: elf!("race"),
    },
    Image {
        name: "victim",
        summary: "holds pages whose content it knows, and says what becomes of them",
        usage: usage::VICTIM,
        elf: elf!("victim"),
    },
    Image {
        name: "attack",
        summary: "tries to get out of umbra, or at it, in one of many ways",
        usage: usage::ATTACK,
        elf: elf!("attack"),
    },
    Image {
        name: "watcher",
        summary: "reads memory that changes behind its back, and says what it sees",
        usage: usage::WATCHER,
        elf: elf!("watcher"),
    },
];
