// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The program that the guest's process is started with: an ELF file with one call of the stub's in it, and nothing more. It is what is
//! there until the stub is mapped.

use shadow_mmu::addr::PAGE_SIZE;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::FromRawFd;

/// What it is called in lists of processes.
pub(super) const NAME: &CStr = c"umbra-guest";

/// Where it is loaded.
const BASE: u64 = 0x40_0000;
/// Where its code is: behind the headers.
pub(super) const CODE: u64 = BASE + 64 + 56;
/// Behind its code.
pub(super) const END: u64 = CODE + 3;

/// The file.
fn program() -> Vec<u8> {
    let mut elf = Vec::with_capacity(128);
    elf.extend(b"\x7fELF\x02\x01\x01");
    elf.resize(16, 0);
    let word16 = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let word32 = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    let word64 = |elf: &mut Vec<u8>, value: u64| elf.extend(value.to_le_bytes());
    word16(&mut elf, 2); // ET_EXEC
    word16(&mut elf, 62); // EM_X86_64
    word32(&mut elf, 1);
    word64(&mut elf, CODE); // entry
    word64(&mut elf, 64); // program headers
    word64(&mut elf, 0); // sections
    word32(&mut elf, 0);
    for value in [64, 56, 1, 0, 0, 0] {
        word16(&mut elf, value);
    }
    word32(&mut elf, 1); // PT_LOAD
    word32(&mut elf, 5); // read, execute
    let bytes = END - BASE;
    for value in [0, BASE, BASE, bytes, bytes, PAGE_SIZE] {
        word64(&mut elf, value);
    }
    elf.extend(b"\x0f\x05\xcc"); // syscall; int3
    elf
}

/// The program as a file without a name.
///
/// # Errors
/// The host's.
pub(super) fn file() -> io::Result<File> {
    let create = |flags: u32| {
        // SAFETY: the name is a string, and a descriptor comes back or an error.
        unsafe { libc::memfd_create(NAME.as_ptr(), flags) }
    };
    let mut fd = create(libc::MFD_CLOEXEC | libc::MFD_EXEC);
    if fd < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
        // Before Linux 6.3 every one can be executed.
        fd = create(libc::MFD_CLOEXEC);
    }
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(&program())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_ends_where_its_header_says() {
        let elf = program();
        assert_eq!(elf.len() as u64, END - BASE);
    }
}
