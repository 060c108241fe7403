//! The processor's tiles where it has none: their instructions fault, and the handler of that signal does what they would,
//! by the model. For tests: so every instruction runs as the compiler placed it, with its registers and addresses. Some
//! thousand times slower than tiles. Linux only.

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Shape;
use super::model::Tiles;

thread_local! {
    static TILES: RefCell<Tiles> = const { RefCell::new(Tiles::new()) };
}

/// Instructions that were emulated.
static COUNT: AtomicU64 = AtomicU64::new(0);

/// Takes over the signal of unknown instructions; false if the system does not let it.
pub(super) fn install() -> bool {
    // SAFETY: the handler has the type that SA_SIGINFO asks for; all zeros are an action with an empty mask.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = on_signal as extern "C" fn(_, _, _) as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()) == 0
    }
}

/// Instructions that were emulated so far, of all threads.
#[cfg(test)]
pub(super) fn count() -> u64 {
    COUNT.load(Ordering::Relaxed)
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system hands over the registers of the thread that faulted, at whose instruction `rip` points; what an
    // instruction reads and writes is its program's.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = registers[libc::REG_RIP as usize] as *const u8;
        let done = Instruction::read(at).and_then(|instruction| {
            TILES.with_borrow_mut(|tiles| instruction.run(tiles, registers))?;
            Some(instruction.bytes)
        });
        match done {
            Some(bytes) => {
                COUNT.fetch_add(1, Ordering::Relaxed);
                registers[libc::REG_RIP as usize] += i64::from(bytes);
            }
            // Not ours, or a fault on a processor with tiles: it faults again, and ends the process.
            None => drop(libc::signal(libc::SIGILL, libc::SIG_DFL)),
        }
    }
}

/// Of the general registers by number, where the system keeps them.
const REGISTERS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// What an instruction does, by prefix and opcode (Software Developer's Manual, volume 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Configure,
    Release,
    Zero,
    Load,
    Store,
    Multiply,
    /// Of bytes, with signs or without.
    Bytes(bool, bool),
}

/// `base + index * scale + displacement`; without a base or index these are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Address {
    base: Option<u8>,
    index: Option<u8>,
    shift: u8,
    displacement: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    kind: Kind,
    /// Field `reg`: the tile of one operand.
    tile: usize,
    /// Fields `rm` and `vvvv`: two tiles more.
    others: [usize; 2],
    address: Address,
    bytes: u8,
}

impl Instruction {
    /// The instruction at `at`, if it is one of tiles: VEX of three bytes, 128 bits, W0, map 0F38.
    ///
    /// # Safety
    /// A whole instruction lies there.
    unsafe fn read(at: *const u8) -> Option<Self> {
        // SAFETY: of a whole instruction only as many bytes are read as those before say that it has.
        let byte = |place: usize| unsafe { *at.add(place) };
        if byte(0) != 0xc4 || byte(1) & 0x1f != 2 || byte(2) & 0x84 != 0 {
            return None;
        }
        let (third, opcode, mode) = (byte(2), byte(3), byte(4));
        let (in_registers, reg, rm) = (mode >> 6 == 3, mode >> 3 & 7, mode & 7);
        let kind = match (third & 3, opcode, in_registers) {
            (0, 0x49, false) if reg == 0 => Kind::Configure,
            (0, 0x49, true) if mode == 0xc0 => Kind::Release,
            (3, 0x49, true) => Kind::Zero,
            (3, 0x4b, false) => Kind::Load,
            (2, 0x4b, false) => Kind::Store,
            (2, 0x5c, true) => Kind::Multiply,
            (signed, 0x5e, true) => Kind::Bytes(signed & 2 != 0, signed & 1 != 0),
            _ => return None,
        };
        // The first byte's upper bits are the registers' fourth, upside down; there are only eight tiles.
        let extended = |bit: u8, low: u8| low | (!byte(1) >> bit & 1) << 3;
        let (mut address, mut bytes) = (Address::default(), 5);
        if !in_registers {
            let mut base = Some(extended(5, rm));
            if rm == 4 {
                let sib = byte(5);
                bytes += 1;
                base = Some(extended(5, sib & 7)).filter(|_| mode >> 6 != 0 || sib & 7 != 5);
                address.index = Some(extended(6, sib >> 3 & 7)).filter(|index| *index != 4);
                address.shift = sib >> 6;
            } else if mode >> 6 == 0 && rm == 5 {
                // Relative to the instruction: not how it is written here.
                return None;
            }
            let wide = mode >> 6 == 2 || base.is_none();
            address.base = base;
            address.displacement = match (mode >> 6, wide) {
                (1, _) => i32::from(byte(bytes) as i8),
                (_, true) => i32::from_le_bytes(std::array::from_fn(|place| byte(bytes + place))),
                _ => 0,
            };
            bytes += match (mode >> 6, wide) {
                (1, _) => 1,
                (_, true) => 4,
                _ => 0,
            };
        }
        let others = [usize::from(rm), usize::from(!third >> 3 & 0xf)];
        let multiplies = matches!(kind, Kind::Multiply | Kind::Bytes(..));
        let tiles = if multiplies { others[1] < 8 } else { others[1] == 0 };
        tiles.then_some(Instruction { kind, tile: reg.into(), others, address, bytes: bytes as u8 })
    }

    /// # Safety
    /// The registers are those that the instruction has, and its memory the program's.
    unsafe fn run(&self, tiles: &mut Tiles, registers: &[i64]) -> Option<()> {
        let of = |number: Option<u8>| {
            number.map_or(0, |number| registers[REGISTERS[usize::from(number)] as usize] as usize)
        };
        let Address { base, index, shift, displacement } = self.address;
        let at = of(base).wrapping_add(displacement as isize as usize);
        // The index is what lies between the rows of a tile.
        let stride = of(index) << shift;
        // SAFETY: the caller's.
        unsafe {
            match self.kind {
                Kind::Configure => tiles.configure(&*(at as *const Shape)),
                Kind::Release => {
                    tiles.release();
                    Some(())
                }
                Kind::Zero => tiles.zero(self.tile),
                Kind::Load => tiles.load(self.tile, at as *const u8, stride),
                Kind::Store => tiles.store(self.tile, at as *mut u8, stride),
                Kind::Multiply => tiles.multiply(self.tile, self.others[0], self.others[1]),
                Kind::Bytes(a, b) => tiles.multiply_bytes(self.tile, self.others[0], self.others[1], (a, b)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::arch::global_asm;

    use super::*;

    // Every form of address that a compiler may choose.
    global_asm!(
        "baton_cpu_forms_begin:",
        "ldtilecfg [rsp + 64]",
        "ldtilecfg [r13]",
        "tileloadd tmm7, [rbp + rax*1]",
        "tileloadd tmm1, [r12 + r15*8 - 4096]",
        "tilestored [r13 + rdx*2 + 127], tmm2",
        "tileloadd tmm0, [rcx*1 + 16]",
        "tdpbf16ps tmm0, tmm7, tmm1",
        "tdpbsud tmm0, tmm7, tmm1",
        "tdpbusd tmm0, tmm7, tmm1",
        "tilezero tmm6",
        "tilerelease",
        "vaddps ymm0, ymm1, ymm2",
        ".skip 8",
    );

    unsafe extern "C" {
        static baton_cpu_forms_begin: u8;
    }

    #[test]
    fn forms_of_addresses_are_read() {
        let (rcx, rdx, rsp, rbp, r12, r13, r15) =
            (Some(1), Some(2), Some(4), Some(5), Some(12), Some(13), Some(15));
        let address = |base, index, shift, displacement| Address { base, index, shift, displacement };
        let expected = [
            (Kind::Configure, 0, address(rsp, None, 0, 64)),
            (Kind::Configure, 0, address(r13, None, 0, 0)),
            (Kind::Load, 7, address(rbp, Some(0), 0, 0)),
            (Kind::Load, 1, address(r12, r15, 3, -4096)),
            (Kind::Store, 2, address(r13, rdx, 1, 127)),
            (Kind::Load, 0, address(None, rcx, 0, 16)),
            (Kind::Multiply, 0, Address::default()),
            (Kind::Bytes(true, false), 0, Address::default()),
            (Kind::Bytes(false, true), 0, Address::default()),
            (Kind::Zero, 6, Address::default()),
            (Kind::Release, 0, Address::default()),
        ];
        let mut at = &raw const baton_cpu_forms_begin;
        for (kind, tile, address) in expected {
            // SAFETY: the instructions above follow each other.
            let read = unsafe { Instruction::read(at) }.unwrap_or_else(|| panic!("{kind:?} is not read"));
            assert_eq!((read.kind, read.tile, read.address), (kind, tile, address));
            if matches!(kind, Kind::Multiply | Kind::Bytes(..)) {
                assert_eq!(read.others, [7, 1]);
            }
            at = at.wrapping_add(read.bytes.into());
        }
        // SAFETY: as above.
        assert_eq!(unsafe { Instruction::read(at) }, None, "another instruction");
    }
}
