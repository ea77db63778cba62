// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Instructions of every class that reaches memory, and what each wants. [`cpu`] asks the CPU about the same table.

use super::*;

mod cpu;

const READ: Access = Access::READ;
const WRITE: Access = Access::WRITE;

/// Memory that everything can reach.
const SAFE: u64 = 0x3000_8000;
const GS_BASE: u64 = 0x1000_0000;

/// An instruction and the operand of it that is looked at.
struct Case {
    name: &'static str,
    code: &'static [u8],
    aim: fn(&mut Shot),
    size: u64,
    align: u64,
    setup: Setup,
    /// What it wants of that operand.
    access: Access,
}

/// What runs before the instruction, and whether every CPU has it.
#[derive(Clone, Copy)]
struct Setup {
    code: &'static [u8],
    cpus: Cpus,
}

#[derive(Clone, Copy, PartialEq)]
enum Cpus {
    All,
    Some,
}

const NONE: Setup = Setup { code: b"", cpus: Cpus::All };
const OPTIONAL: Setup = Setup { code: b"", cpus: Cpus::Some };
const XSAVE: Setup = OPTIONAL;
/// All ones in mm1, the mask of `maskmovq`.
const MMX: Setup = Setup { code: b"\x0f\x76\xc9", cpus: Cpus::All };
/// All ones in xmm1, the mask of `maskmovdqu`.
const SSE: Setup = Setup { code: b"\x66\x0f\x76\xc9", cpus: Cpus::All };
/// 1.0 in st(0).
const X87: Setup = Setup { code: b"\xdb\xe3\xd9\xe8", cpus: Cpus::All };
/// All ones in zmm1 and k1, the masks; zero in zmm2, the indices.
const AVX512: Setup = Setup {
    code: b"\x62\xf3\x75\x48\x25\xc9\xff\x62\xf1\xed\x48\xef\xd2\xc4\xe1\xf4\x46\xc9",
    cpus: Cpus::Some,
};

/// One try: the instruction, and the registers with which it reaches for `at`.
struct Shot {
    regs: Regs,
    code: Vec<u8>,
    at: u64,
}

impl Shot {
    /// With the instruction at `rip`.
    fn new(case: &Case, rip: u64, fs_base: u64, at: u64) -> Self {
        let regs = Regs {
            rax: 7,
            rbx: SAFE,
            rcx: SAFE,
            rsi: SAFE,
            rdi: SAFE,
            rbp: SAFE + 0x400,
            rsp: SAFE + 0x800,
            rip,
            rflags: 0x202,
            fs_base,
            gs_base: GS_BASE,
            ..Regs::default()
        };
        let mut shot = Self { regs, code: case.code.to_vec(), at };
        (case.aim)(&mut shot);
        shot
    }
}

const RBX: fn(&mut Shot) = |s| s.regs.rbx = s.at;
/// What is above bit 31 does not count.
const EBX: fn(&mut Shot) = |s| s.regs.rbx = s.at | 5 << 32;
const RSP: fn(&mut Shot) = |s| s.regs.rsp = s.at;
const RBP: fn(&mut Shot) = |s| s.regs.rbp = s.at;
const RBP_16: fn(&mut Shot) = |s| s.regs.rbp = s.at + 16;
const RSI: fn(&mut Shot) = |s| s.regs.rsi = s.at;
const RDI: fn(&mut Shot) = |s| s.regs.rdi = s.at;
const BOTH: fn(&mut Shot) = |s| (s.regs.rsi, s.regs.rdi) = (s.at, s.at);
const PUSH: fn(&mut Shot) = |s| s.regs.rsp = s.at + 8;
const PUSH2: fn(&mut Shot) = |s| s.regs.rsp = s.at + 2;
const PUSH32: fn(&mut Shot) = |s| s.regs.rsp = s.at + 32;
/// The operand of `push [rsp+8]`.
const RSP_8: fn(&mut Shot) = |s| s.regs.rsp = s.at - 8;
/// The operand of `pop [rsp+8]`: rsp is that after the load.
const POP_RSP_8: fn(&mut Shot) = |s| s.regs.rsp = s.at - 16;
const XLAT: fn(&mut Shot) = |s| s.regs.rbx = s.at - 7;
const CLZERO: fn(&mut Shot) = |s| s.regs.rax = s.at + 5;
const FS: fn(&mut Shot) = |s| s.regs.rcx = s.at.wrapping_sub(s.regs.fs_base);
const GS: fn(&mut Shot) = |s| (s.regs.rcx, s.regs.rdi) = (8, s.at - GS_BASE - 0x80);
const RIP: fn(&mut Shot) = |s| {
    let distance = s.at.wrapping_sub(s.regs.rip + 7) as u32;
    s.code[3..7].copy_from_slice(&distance.to_le_bytes());
};
const MOFFS: fn(&mut Shot) = |s| s.code[1..9].copy_from_slice(&s.at.to_le_bytes());
const MOFFS2: fn(&mut Shot) = |s| s.code[2..10].copy_from_slice(&s.at.to_le_bytes());
const BITS_UP: fn(&mut Shot) = |s| (s.regs.rbx, s.regs.rcx) = (s.at - 80, 645);
const BITS_DOWN: fn(&mut Shot) = |s| (s.regs.rbx, s.regs.rcx) = (s.at + 80, -635_i64 as u64);
const BITS32_DOWN: fn(&mut Shot) = |s| (s.regs.rbx, s.regs.rcx) = (s.at + 80, u64::from(-635_i32 as u32));
const BITS16_DOWN: fn(&mut Shot) = |s| (s.regs.rbx, s.regs.rcx) = (s.at + 80, u64::from(-635_i16 as u16));
const DOWN_RDI: fn(&mut Shot) = |s| (s.regs.rdi, s.regs.rflags) = (s.at, 0x602);
const REP_RDI: fn(&mut Shot) = |s| (s.regs.rdi, s.regs.rcx) = (s.at, 64);
const REP_EDI: fn(&mut Shot) = |s| (s.regs.rdi, s.regs.rcx) = (s.at, 5 << 32 | 64);
const REP_RSI: fn(&mut Shot) = |s| (s.regs.rsi, s.regs.rcx) = (s.at, 64);
/// The source is before the target and runs into it.
const REP_NEAR: fn(&mut Shot) = |s| (s.regs.rsi, s.regs.rdi, s.regs.rcx) = (s.at + 16, s.at, 64);
const DOWN_REP_RDI: fn(&mut Shot) = |s| {
    (s.regs.rdi, s.regs.rcx, s.regs.rflags) = (s.at + 56, 57, 0x602);
};
const DOWN_REP_RSI: fn(&mut Shot) = |s| {
    (s.regs.rsi, s.regs.rcx, s.regs.rflags) = (s.at + 56, 57, 0x602);
};

const fn case(
    name: &'static str,
    code: &'static [u8],
    aim: fn(&mut Shot),
    size: u64,
    align: u64,
    setup: Setup,
    access: Access,
) -> Case {
    Case { name, code, aim, size, align, setup, access }
}

fn access_at(code: &[u8], regs: &Regs, addr: u64) -> Access {
    AccessDecoder::new().access_at(code, regs, addr)
}

#[test]
fn operands_are_covered_from_their_first_byte_to_their_last() {
    for case in CASES {
        // What is known of where these store is not in the general registers.
        let anywhere = ["vpscatter", "vscatter", "xsave"].iter().any(|name| case.name.starts_with(name));
        let shot = Shot::new(case, 0x2000_0000, 0x7000_0000, 0x3000_1000);
        let asked = |addr| access_at(&shot.code, &shot.regs, addr);
        assert_eq!(asked(shot.at), case.access, "{}", case.name);
        // How far these reach has a test of its own.
        if !case.name.starts_with("rep stos") && !case.name.starts_with("rep movs") {
            assert_eq!(asked(shot.at + case.size - 1), case.access, "{}", case.name);
            assert!(anywhere || asked(shot.at + case.size) == READ, "{}: behind it", case.name);
            assert!(anywhere || asked(shot.at - 1) == READ, "{}: before it", case.name);
        }
    }
}

#[test]
fn repeated_stores_reach_as_far_as_the_count_says() {
    let regs = |rflags| Regs { rdi: 0x3000_1000, rsi: SAFE, rcx: 3, rflags, ..Regs::default() };
    let asked = |rflags, addr| access_at(b"\xf3\x48\xa5", &regs(rflags), addr);
    assert_eq!(
        [0x0fff, 0x1000, 0x1017, 0x1018].map(|low| asked(0x202, 0x3000_0000 + low)),
        [READ, WRITE, WRITE, READ]
    );
    assert_eq!(
        [0x0fef, 0x0ff0, 0x1007, 0x1008].map(|low| asked(0x602, 0x3000_0000 + low)),
        [READ, WRITE, WRITE, READ]
    );
    let nothing_left = Regs { rcx: 0, ..regs(0x202) };
    assert_eq!(access_at(b"\xf3\x48\xa5", &nothing_left, 0x3000_1000), READ);
}

#[test]
fn a_fetch_is_of_the_first_byte_that_is_missing() {
    let code = b"\x48\xc7\x03\x01\x00\x00\x00"; // mov qword ptr [rbx], 1
    for have in 0..code.len() {
        // Also where the operand is at the missing byte.
        let rip = 0x2000_1000 - have as u64;
        let regs = Regs { rip, rbx: 0x2000_1000, ..Regs::default() };
        assert_eq!(access_at(&code[..have], &regs, 0x2000_1000), Access::EXEC);
        assert_eq!(access_at(&code[..have], &regs, 0x2000_1001), READ);
    }
    let regs = Regs { rip: 0x2000_0ff9, rbx: 0x2000_1000, ..Regs::default() };
    assert_eq!(access_at(code, &regs, 0x2000_1000), WRITE);
}

#[test]
fn what_cannot_be_decoded_reads() {
    assert_eq!(access_at(&[0x06; 15], &Regs { rsp: 0x1008, ..Regs::default() }, 0x1000), READ);
    assert_eq!(access_at(&[0x66; 15], &Regs::default(), 0x1000), READ);
}

/// `cargo test --release -p vmm --lib measure_access -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn measure_access_at() {
    let shots: Vec<Shot> =
        CASES.iter().map(|case| Shot::new(case, 0x2000_0000, 0x7000_0000, 0x3000_1000)).collect();
    let rounds = 20_000_u32;
    let mut kept = AccessDecoder::new();
    let time = |mut ask: Box<dyn FnMut(&Shot) -> Access + '_>| {
        let start = std::time::Instant::now();
        for _ in 0..rounds {
            for shot in &shots {
                std::hint::black_box(ask(std::hint::black_box(shot)));
            }
        }
        start.elapsed().as_nanos() as f64 / f64::from(rounds) / shots.len() as f64
    };
    let fresh = time(Box::new(|shot| access_at(&shot.code, &shot.regs, shot.at)));
    let reused = time(Box::new(|shot| kept.access_at(&shot.code, &shot.regs, shot.at)));
    println!("ns per call: {fresh:.0} with a new decoder each, {reused:.0} with one kept");
}

/// Assembled with GNU as: name, code, how to aim it, size and alignment of the operand, setup, access.
#[rustfmt::skip]
const CASES: &[Case] = &[
    case("mov rax,[rbx]", b"\x48\x8b\x03", RBX, 8, 1, NONE, READ),
    case("mov [rbx],rax", b"\x48\x89\x03", RBX, 8, 1, NONE, WRITE),
    case("mov byte ptr [rbx],1", b"\xc6\x03\x01", RBX, 1, 1, NONE, WRITE),
    case("mov [rbx],cx", b"\x66\x89\x0b", RBX, 2, 1, NONE, WRITE),
    case("mov [rbx],ds", b"\x8c\x1b", RBX, 2, 1, NONE, WRITE),
    case("movabs [0x112233445566],al", b"\xa2\x66\x55\x44\x33\x22\x11\x00\x00", MOFFS, 1, 1, NONE, WRITE),
    case("movabs rax,[0x112233445566]", b"\x48\xa1\x66\x55\x44\x33\x22\x11\x00\x00", MOFFS2, 8, 1, NONE, READ),
    case("mov [rip+0x1000],rax", b"\x48\x89\x05\x00\x10\x00\x00", RIP, 8, 1, NONE, WRITE),
    case("mov rax,[rip+0x1000]", b"\x48\x8b\x05\x00\x10\x00\x00", RIP, 8, 1, NONE, READ),
    case("mov dword ptr [ebx],eax", b"\x67\x89\x03", EBX, 4, 1, NONE, WRITE),
    case("mov fs:[rcx],rax", b"\x64\x48\x89\x01", FS, 8, 1, NONE, WRITE),
    case("mov rax,fs:[rcx]", b"\x64\x48\x8b\x01", FS, 8, 1, NONE, READ),
    case("mov gs:[rdi+rcx*8+0x40],rax", b"\x65\x48\x89\x44\xcf\x40", GS, 8, 1, NONE, WRITE),
    case("add [rbx],rax", b"\x48\x01\x03", RBX, 8, 1, NONE, WRITE),
    case("adc [rbx],eax", b"\x11\x03", RBX, 4, 1, NONE, WRITE),
    case("add rax,[rbx]", b"\x48\x03\x03", RBX, 8, 1, NONE, READ),
    case("cmp [rbx],rax", b"\x48\x39\x03", RBX, 8, 1, NONE, READ),
    case("test [rbx],rax", b"\x48\x85\x03", RBX, 8, 1, NONE, READ),
    case("inc dword ptr [rbx]", b"\xff\x03", RBX, 4, 1, NONE, WRITE),
    case("not qword ptr [rbx]", b"\x48\xf7\x13", RBX, 8, 1, NONE, WRITE),
    case("shl qword ptr [rbx],1", b"\x48\xd1\x23", RBX, 8, 1, NONE, WRITE),
    case("shld [rbx],rax,3", b"\x48\x0f\xa4\x03\x03", RBX, 8, 1, NONE, WRITE),
    case("lock xadd [rbx],rax", b"\xf0\x48\x0f\xc1\x03", RBX, 8, 1, NONE, WRITE),
    case("xchg [rbx],rax", b"\x48\x87\x03", RBX, 8, 1, NONE, WRITE),
    case("xchg [rbx],ah", b"\x86\x23", RBX, 1, 1, NONE, WRITE),
    case("cmpxchg [rbx],rcx", b"\x48\x0f\xb1\x0b", RBX, 8, 1, NONE, WRITE),
    case("lock cmpxchg [rbx],rcx", b"\xf0\x48\x0f\xb1\x0b", RBX, 8, 1, NONE, WRITE),
    case("cmpxchg8b [rbx]", b"\x0f\xc7\x0b", RBX, 8, 1, NONE, WRITE),
    case("cmpxchg16b [rbx]", b"\x48\x0f\xc7\x0b", RBX, 16, 16, NONE, WRITE),
    case("lock cmpxchg16b [rbx]", b"\xf0\x48\x0f\xc7\x0b", RBX, 16, 16, NONE, WRITE),
    case("setz [rbx]", b"\x0f\x94\x03", RBX, 1, 1, NONE, WRITE),
    case("cmovz rax,[rbx]", b"\x48\x0f\x44\x03", RBX, 8, 1, NONE, READ),
    case("cmovnz rax,[rbx]", b"\x48\x0f\x45\x03", RBX, 8, 1, NONE, READ),
    case("div qword ptr [rbx]", b"\x48\xf7\x33", RBX, 8, 1, NONE, READ),
    case("movnti [rbx],rax", b"\x48\x0f\xc3\x03", RBX, 8, 1, NONE, WRITE),
    case("movbe [rbx],rax", b"\x48\x0f\x38\xf1\x03", RBX, 8, 1, OPTIONAL, WRITE),
    case("movbe rax,[rbx]", b"\x48\x0f\x38\xf0\x03", RBX, 8, 1, OPTIONAL, READ),
    case("bt [rbx],rcx", b"\x48\x0f\xa3\x0b", BITS_UP, 8, 1, NONE, READ),
    case("bts [rbx],rcx", b"\x48\x0f\xab\x0b", BITS_UP, 8, 1, NONE, WRITE),
    case("btr [rbx],rcx", b"\x48\x0f\xb3\x0b", BITS_DOWN, 8, 1, NONE, WRITE),
    case("lock btc dword ptr [rbx],ecx", b"\xf0\x0f\xbb\x0b", BITS32_DOWN, 4, 1, NONE, WRITE),
    case("bts word ptr [rbx],cx", b"\x66\x0f\xab\x0b", BITS16_DOWN, 2, 1, NONE, WRITE),
    case("btc qword ptr [rbx],5", b"\x48\x0f\xba\x3b\x05", RBX, 8, 1, NONE, WRITE),
    case("push rax", b"\x50", PUSH, 8, 1, NONE, WRITE),
    case("push 1", b"\x6a\x01", PUSH, 8, 1, NONE, WRITE),
    case("pushf", b"\x9c", PUSH, 8, 1, NONE, WRITE),
    case("pushw 1", b"\x66\x6a\x01", PUSH2, 2, 1, NONE, WRITE),
    case("push fs", b"\x0f\xa0", PUSH, 8, 1, NONE, WRITE),
    case("push qword ptr [rbx]", b"\xff\x33", PUSH, 8, 1, NONE, WRITE),
    case("push qword ptr [rbx]", b"\xff\x33", RBX, 8, 1, NONE, READ),
    case("push qword ptr [rsp+8]", b"\xff\x74\x24\x08", RSP_8, 8, 1, NONE, READ),
    case("pop rax", b"\x58", RSP, 8, 1, NONE, READ),
    case("popf", b"\x9d", RSP, 8, 1, NONE, READ),
    case("pop qword ptr [rbx]", b"\x8f\x03", RBX, 8, 1, NONE, WRITE),
    case("pop qword ptr [rbx]", b"\x8f\x03", RSP, 8, 1, NONE, READ),
    case("pop qword ptr [rsp+8]", b"\x8f\x44\x24\x08", POP_RSP_8, 8, 1, NONE, WRITE),
    case("call .+5", b"\xe8\x00\x00\x00\x00", PUSH, 8, 1, NONE, WRITE),
    case("call rcx", b"\xff\xd1", PUSH, 8, 1, NONE, WRITE),
    case("call qword ptr [rbx]", b"\xff\x13", PUSH, 8, 1, NONE, WRITE),
    case("call qword ptr [rbx]", b"\xff\x13", RBX, 8, 1, NONE, READ),
    case("jmp qword ptr [rbx]", b"\xff\x23", RBX, 8, 1, NONE, READ),
    case("ret", b"\xc3", RSP, 8, 1, NONE, READ),
    case("ret 16", b"\xc2\x10\x00", RSP, 8, 1, NONE, READ),
    case("iretq", b"\x48\xcf", RSP, 40, 1, NONE, READ),
    case("retf", b"\xcb", RSP, 8, 1, NONE, READ),
    case("enter 32,0", b"\xc8\x20\x00\x00", PUSH, 8, 1, NONE, WRITE),
    case("enter 32,3", b"\xc8\x20\x00\x03", PUSH32, 32, 1, NONE, WRITE),
    case("enter 32,3", b"\xc8\x20\x00\x03", RBP_16, 16, 1, NONE, READ),
    case("leave", b"\xc9", RBP, 8, 1, NONE, READ),
    case("xlat", b"\xd7", XLAT, 1, 1, NONE, READ),
    case("movsb", b"\xa4", RDI, 1, 1, NONE, WRITE),
    case("movsb", b"\xa4", RSI, 1, 1, NONE, READ),
    case("movsq", b"\x48\xa5", RDI, 8, 1, NONE, WRITE),
    case("movsq", b"\x48\xa5", RSI, 8, 1, NONE, READ),
    case("movsq", b"\x48\xa5", BOTH, 8, 1, NONE, READ),
    case("movsq", b"\x48\xa5", DOWN_RDI, 8, 1, NONE, WRITE),
    case("rep movsb", b"\xf3\xa4", REP_RDI, 64, 1, NONE, WRITE),
    case("rep movsb", b"\xf3\xa4", REP_RSI, 64, 1, NONE, READ),
    case("rep movsq", b"\xf3\x48\xa5", REP_RDI, 64, 1, NONE, WRITE),
    case("rep movsq", b"\xf3\x48\xa5", REP_RSI, 64, 1, NONE, READ),
    case("rep movsb", b"\xf3\xa4", DOWN_REP_RDI, 64, 1, NONE, WRITE),
    case("rep movsq", b"\xf3\x48\xa5", DOWN_REP_RDI, 64, 1, NONE, WRITE),
    case("rep movsb", b"\xf3\xa4", DOWN_REP_RSI, 64, 1, NONE, READ),
    case("rep movsb", b"\xf3\xa4", REP_NEAR, 64, 1, NONE, WRITE),
    case("stosb", b"\xaa", RDI, 1, 1, NONE, WRITE),
    case("stosq", b"\x48\xab", RDI, 8, 1, NONE, WRITE),
    case("rep stosb", b"\xf3\xaa", REP_RDI, 64, 1, NONE, WRITE),
    case("rep stosq", b"\xf3\x48\xab", REP_RDI, 64, 1, NONE, WRITE),
    case("rep stosq", b"\xf3\x48\xab", DOWN_REP_RDI, 64, 1, NONE, WRITE),
    case("rep stos dword ptr es:[edi],eax", b"\x67\xf3\xab", REP_EDI, 64, 1, NONE, WRITE),
    case("lodsq", b"\x48\xad", RSI, 8, 1, NONE, READ),
    case("rep lodsb", b"\xf3\xac", REP_RSI, 64, 1, NONE, READ),
    case("scasb", b"\xae", RDI, 1, 1, NONE, READ),
    case("repne scasb", b"\xf2\xae", REP_RDI, 64, 1, NONE, READ),
    case("cmpsq", b"\x48\xa7", RDI, 8, 1, NONE, READ),
    case("repe cmpsb", b"\xf3\xa6", REP_RSI, 64, 1, NONE, READ),
    case("movups [rbx],xmm0", b"\x0f\x11\x03", RBX, 16, 1, NONE, WRITE),
    case("movups xmm0,[rbx]", b"\x0f\x10\x03", RBX, 16, 1, NONE, READ),
    case("movaps [rbx],xmm0", b"\x0f\x29\x03", RBX, 16, 16, NONE, WRITE),
    case("movss dword ptr [rbx],xmm0", b"\xf3\x0f\x11\x03", RBX, 4, 1, NONE, WRITE),
    case("movhps qword ptr [rbx],xmm0", b"\x0f\x17\x03", RBX, 8, 1, NONE, WRITE),
    case("movlpd xmm0,qword ptr [rbx]", b"\x66\x0f\x12\x03", RBX, 8, 1, NONE, READ),
    case("movq qword ptr [rbx],mm0", b"\x0f\x7f\x03", RBX, 8, 1, MMX, WRITE),
    case("movntq [rbx],mm0", b"\x0f\xe7\x03", RBX, 8, 1, MMX, WRITE),
    case("movntdq [rbx],xmm0", b"\x66\x0f\xe7\x03", RBX, 16, 16, NONE, WRITE),
    case("pextrb [rbx],xmm0,1", b"\x66\x0f\x3a\x14\x03\x01", RBX, 1, 1, NONE, WRITE),
    case("maskmovq mm0,mm1", b"\x0f\xf7\xc1", RDI, 8, 1, MMX, WRITE),
    case("maskmovdqu xmm0,xmm1", b"\x66\x0f\xf7\xc1", RDI, 16, 1, SSE, WRITE),
    case("sha256msg1 xmm0,[rbx]", b"\x0f\x38\xcc\x03", RBX, 16, 16, OPTIONAL, READ),
    case("vmovups [rbx],ymm0", b"\xc5\xfc\x11\x03", RBX, 32, 1, AVX512, WRITE),
    case("vmovups ymm0,[rbx]", b"\xc5\xfc\x10\x03", RBX, 32, 1, AVX512, READ),
    case("vmaskmovps [rbx],ymm1,ymm0", b"\xc4\xe2\x75\x2e\x03", RBX, 32, 1, AVX512, WRITE),
    case("vmaskmovps ymm0,ymm1,[rbx]", b"\xc4\xe2\x75\x2c\x03", RBX, 32, 1, AVX512, READ),
    case("vextracti128 [rbx],ymm0,1", b"\xc4\xe3\x7d\x39\x03\x01", RBX, 16, 1, AVX512, WRITE),
    case("vmovdqu64 [rbx],zmm0", b"\x62\xf1\xfe\x48\x7f\x03", RBX, 64, 1, AVX512, WRITE),
    case("vmovdqu8 [rbx]{k1},zmm0", b"\x62\xf1\x7f\x49\x7f\x03", RBX, 64, 1, AVX512, WRITE),
    case("vmovdqu32 zmm0{k1},[rbx]", b"\x62\xf1\x7e\x49\x6f\x03", RBX, 64, 1, AVX512, READ),
    case("vpcompressd [rbx]{k1},zmm0", b"\x62\xf2\x7d\x49\x8b\x03", RBX, 64, 1, AVX512, WRITE),
    case("vpexpandd zmm0{k1},[rbx]", b"\x62\xf2\x7d\x49\x89\x03", RBX, 64, 1, AVX512, READ),
    case("vpscatterdd [rbx+zmm2*4]{k1},zmm0", b"\x62\xf2\x7d\x49\xa0\x04\x93", RBX, 4, 1, AVX512, WRITE),
    case("vscatterqpd [rbx+zmm2*8]{k1},zmm0", b"\x62\xf2\xfd\x49\xa3\x04\xd3", RBX, 8, 1, AVX512, WRITE),
    case("vpgatherdd zmm0{k1},[rbx+zmm2*4]", b"\x62\xf2\x7d\x49\x90\x04\x93", RBX, 4, 1, AVX512, READ),
    case("vpgatherdd ymm0,[rbx+ymm2*4],ymm1", b"\xc4\xe2\x75\x90\x04\x93", RBX, 4, 1, AVX512, READ),
    case("kmovq [rbx],k1", b"\xc4\xe1\xf8\x91\x0b", RBX, 8, 1, AVX512, WRITE),
    case("kmovq k1,[rbx]", b"\xc4\xe1\xf8\x90\x0b", RBX, 8, 1, AVX512, READ),
    case("vpmovqd [rbx],zmm0", b"\x62\xf2\x7e\x48\x35\x03", RBX, 32, 1, AVX512, WRITE),
    case("vcvtps2ph [rbx],ymm0,0", b"\xc4\xe3\x7d\x1d\x03\x00", RBX, 16, 1, AVX512, WRITE),
    case("vaddps zmm0,zmm1,dword ptr [rbx]{1to16}", b"\x62\xf1\x74\x58\x58\x03", RBX, 4, 1, AVX512, READ),
    case("fld qword ptr [rbx]", b"\xdd\x03", RBX, 8, 1, NONE, READ),
    case("fst qword ptr [rbx]", b"\xdd\x13", RBX, 8, 1, X87, WRITE),
    case("fstp tbyte ptr [rbx]", b"\xdb\x3b", RBX, 10, 1, X87, WRITE),
    case("fistp qword ptr [rbx]", b"\xdf\x3b", RBX, 8, 1, X87, WRITE),
    case("fbstp tbyte ptr [rbx]", b"\xdf\x33", RBX, 10, 1, X87, WRITE),
    case("fnstcw [rbx]", b"\xd9\x3b", RBX, 2, 1, NONE, WRITE),
    case("fldcw [rbx]", b"\xd9\x2b", RBX, 2, 1, NONE, READ),
    case("fnstsw [rbx]", b"\xdd\x3b", RBX, 2, 1, NONE, WRITE),
    case("fnstenv [rbx]", b"\xd9\x33", RBX, 28, 1, NONE, WRITE),
    case("fldenv [rbx]", b"\xd9\x23", RBX, 28, 1, NONE, READ),
    case("fnsave [rbx]", b"\xdd\x33", RBX, 108, 1, NONE, WRITE),
    case("frstor [rbx]", b"\xdd\x23", RBX, 108, 1, NONE, READ),
    case("fxsave64 [rbx]", b"\x48\x0f\xae\x03", RBX, 512, 16, NONE, WRITE),
    case("fxrstor64 [rbx]", b"\x48\x0f\xae\x0b", RBX, 512, 16, NONE, READ),
    case("xsave64 [rbx]", b"\x48\x0f\xae\x23", RBX, 576, 64, XSAVE, WRITE),
    case("xsaveopt64 [rbx]", b"\x48\x0f\xae\x33", RBX, 576, 64, XSAVE, WRITE),
    case("xsavec64 [rbx]", b"\x48\x0f\xc7\x23", RBX, 576, 64, XSAVE, WRITE),
    case("xrstor64 [rbx]", b"\x48\x0f\xae\x2b", RBX, 576, 64, XSAVE, READ),
    case("stmxcsr [rbx]", b"\x0f\xae\x1b", RBX, 4, 1, NONE, WRITE),
    case("ldmxcsr [rbx]", b"\x0f\xae\x13", RBX, 4, 1, NONE, READ),
    case("movdiri [rbx],rax", b"\x48\x0f\x38\xf9\x03", RBX, 8, 8, OPTIONAL, WRITE),
    case("movdir64b rdi,[rbx]", b"\x66\x0f\x38\xf8\x3b", RDI, 64, 64, OPTIONAL, WRITE),
    case("movdir64b rdi,[rbx]", b"\x66\x0f\x38\xf8\x3b", RBX, 64, 1, OPTIONAL, READ),
    case("clzero", b"\x0f\x01\xfc", CLZERO, 64, 64, OPTIONAL, WRITE),
    case("clflush [rbx]", b"\x0f\xae\x3b", RBX, 1, 1, NONE, READ),
];
