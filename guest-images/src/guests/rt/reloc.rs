// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Self-relocation of a static-pie: adds the load address to every pointer the linker left to be completed.

/// One entry of the dynamic section (`Elf64_Dyn`).
#[repr(C)]
pub struct Dynamic {
    tag: u64,
    value: u64,
}

/// One relocation with addend (`Elf64_Rela`).
#[repr(C)]
struct Rela {
    offset: u64,
    info: u64,
    addend: u64,
}

const DT_NULL: u64 = 0;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;
const R_X86_64_RELATIVE: u64 = 8;

/// Applies the relative relocations of the image at `base`, whose dynamic section is `dynamic`. Any other
/// kind would need symbols, which a static-pie does not have, so it ends the process (status 127).
///
/// # Safety
/// To be called once, first of all, by `_start` with the addresses of the ELF header and the dynamic section.
/// It may use no relocated pointer itself: no string, no function table, no panic.
pub unsafe extern "C" fn relocate(base: usize, dynamic: *const Dynamic) {
    let mut table = 0;
    let mut bytes = 0;
    let mut entry = dynamic;
    loop {
        // SAFETY: the dynamic section ends with DT_NULL, where this loop ends too.
        let Dynamic { tag, value } = unsafe { entry.read() };
        match tag {
            DT_NULL => break,
            DT_RELA => table = value as usize,
            DT_RELASZ => bytes = value as usize,
            _ => {}
        }
        entry = entry.wrapping_add(1);
    }
    let table = base.wrapping_add(table) as *const Rela;
    let mut index = 0;
    while index < bytes / size_of::<Rela>() {
        // SAFETY: the linker wrote DT_RELASZ bytes of relocations at DT_RELA.
        let rela = unsafe { table.wrapping_add(index).read() };
        if rela.info & 0xffff_ffff != R_X86_64_RELATIVE {
            super::sys::exit_group(127);
        }
        let place = base.wrapping_add(rela.offset as usize) as *mut usize;
        // SAFETY: a relocation names a word in this image's writable segment.
        unsafe { place.write_unaligned(base.wrapping_add(rela.addend as usize)) };
        index += 1;
    }
}
