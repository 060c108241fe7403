//! What this machine can do at most, measured: bytes read of memory, and multiply-adds in registers.

use std::time::Instant;

use backend_cpu::{Level, cores};

/// Limits of the threads together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Bytes per second read of memory.
    pub read: f64,
    /// Operations per second of bf16 or f32 products, whichever are quicker, two per multiply-add.
    pub floats: f64,
    /// The same of bf16 in tiles; 0 where there are none. Of bytes, of which whole numbers take two to four, tiles do twice as many.
    pub tiles: f64,
    /// The same of whole numbers of 16 bits; 0 where there are none.
    pub int16: f64,
    /// The same of signed bytes by unsigned ones; 0 where there is none.
    pub int8: f64,
}

/// Bytes that each thread reads: several times what caches hold.
const READ_BYTES: usize = 256 << 20;
/// Rounds of the loop in registers.
const ROUNDS: usize = 2_000_000;

/// Buffers to read, made once.
pub struct Probe {
    memory: Vec<Vec<u64>>,
    /// What each thread stays on, if on anything.
    cores: Vec<usize>,
}

impl Probe {
    pub fn new(threads: usize, cores: Vec<usize>) -> Self {
        let fill = |thread: usize| (0..READ_BYTES / 8).map(|at| (at ^ thread) as u64).collect();
        Probe { memory: (0..threads).map(fill).collect(), cores }
    }

    /// Measures once; the best of many is the limit.
    pub fn measure(&self) -> Limits {
        let read = self.together(|memory| {
            std::hint::black_box(sum(memory));
            size_of_val(memory) as f64
        });
        let floats = self.together(|_| floats()).max(self.together(|_| bf16()));
        let (tiles, int16) = (self.together(|_| tiles()), self.together(|_| int16()));
        Limits { read, floats, tiles, int16, int8: self.together(|_| int8()) }
    }

    /// Work per second of all threads at once, each saying how much it did.
    fn together(&self, work: impl Fn(&[u64]) -> f64 + Sync) -> f64 {
        let begun = Instant::now();
        let done: f64 = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .memory
                .iter()
                .enumerate()
                .map(|(at, memory)| {
                    let core = self.cores.get(at).copied();
                    let work = &work;
                    scope.spawn(move || {
                        core.into_iter().for_each(cores::stay);
                        work(memory)
                    })
                })
                .collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).sum()
        });
        done / begun.elapsed().as_secs_f64()
    }
}

impl Limits {
    /// The larger of each.
    pub fn best(self, other: Limits) -> Limits {
        Limits {
            read: self.read.max(other.read),
            floats: self.floats.max(other.floats),
            tiles: self.tiles.max(other.tiles),
            int16: self.int16.max(other.int16),
            int8: self.int8.max(other.int8),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn sum(memory: &[u64]) -> u64 {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the instructions are there.
        return unsafe { x86::sum(memory) };
    }
    plain_sum(memory)
}

#[cfg(not(target_arch = "x86_64"))]
fn sum(memory: &[u64]) -> u64 {
    plain_sum(memory)
}

fn plain_sum(memory: &[u64]) -> u64 {
    let sums = memory.chunks_exact(32).fold([0u64; 32], |mut sums, words| {
        sums.iter_mut().zip(words).for_each(|(sum, word)| *sum ^= *word);
        sums
    });
    sums.iter().fold(0, |a, b| a ^ b)
}

fn bf16() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the instructions are there.
        return unsafe { x86::bf16(ROUNDS) };
    }
    0.0
}

fn tiles() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if Level::Amx.available() {
        // SAFETY: the instructions are there, and the system lets this process use them.
        return unsafe { x86::tiles(ROUNDS / 4) };
    }
    0.0
}

fn int16() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the instructions are there.
        return unsafe { x86::int16(ROUNDS) };
    }
    0.0
}

fn int8() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the instructions are there.
        return unsafe { x86::int8(ROUNDS) };
    }
    0.0
}

/// Fused multiply-adds of f32, as the compiler makes them where there is no AVX-512.
fn floats() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the instructions are there.
        return unsafe { x86::floats(ROUNDS) };
    }
    let mut sums = [[0f32; 16]; 8];
    let (x, y) = (std::hint::black_box([0.5f32; 16]), std::hint::black_box([0.25f32; 16]));
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            for lane in 0..16 {
                sum[lane] = x[lane].mul_add(y[lane], sum[lane]);
            }
        }
    }
    std::hint::black_box(sums);
    (ROUNDS * 8 * 16 * 2) as f64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;

    /// Accumulators in flight.
    const SUMS: usize = 12;

    #[target_feature(enable = "avx512f")]
    pub fn sum(memory: &[u64]) -> u64 {
        let mut sums = [_mm512_setzero_si512(); 4];
        for lines in memory.chunks_exact(32) {
            for (at, sum) in sums.iter_mut().enumerate() {
                // SAFETY: four lines of eight words.
                let line = unsafe { _mm512_loadu_si512(lines.as_ptr().add(at * 8).cast()) };
                *sum = _mm512_xor_si512(*sum, line);
            }
        }
        let [a, b, c, d] = sums;
        _mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d))) as u64
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16(rounds: usize) -> f64 {
        let mut sums = [_mm512_setzero_ps(); SUMS];
        let ones = std::hint::black_box(_mm512_set1_epi32(0x3f80_3f80));
        // SAFETY: both are 512 bits of whatever.
        let x = unsafe { std::mem::transmute::<__m512i, __m512bh>(ones) };
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, x, x);
            }
        }
        std::hint::black_box(sums);
        (rounds * SUMS * 32 * 2) as f64
    }

    /// Sizes of tiles, as the instruction reads them: all of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Sizes {
        palette: [u8; 16],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// # Safety
    /// This process may use AMX.
    pub unsafe fn tiles(rounds: usize) -> f64 {
        let mut sizes = Sizes { palette: [0; 16], row_bytes: [0; 16], rows: [0; 16] };
        sizes.palette[0] = 1;
        sizes.row_bytes[..8].fill(64);
        sizes.rows[..8].fill(16);
        // SAFETY: the caller's; tiles are zeros from there on.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &sizes, options(nostack, readonly)) };
        for _ in 0..rounds {
            // SAFETY: as above.
            unsafe {
                asm!(
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    options(nostack, nomem)
                );
            }
        }
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
        (rounds * 4 * 16 * 16 * 32 * 2) as f64
    }

    #[target_feature(enable = "avx512f")]
    pub fn floats(rounds: usize) -> f64 {
        let mut sums = [_mm512_setzero_ps(); SUMS];
        let x = std::hint::black_box(_mm512_set1_ps(0.5));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(x, x, *sum);
            }
        }
        std::hint::black_box(sums);
        (rounds * SUMS * 16 * 2) as f64
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn int16(rounds: usize) -> f64 {
        let mut sums = [_mm512_setzero_si512(); SUMS];
        let x = std::hint::black_box(_mm512_set1_epi32(0x0001_0001));
        for _ in 0..rounds {
            for sum in &mut sums {
                // The compiler would make two instructions of the intrinsic.
                // SAFETY: register arithmetic.
                unsafe {
                    asm!("vpdpwssd {sum}, {x}, {x}", sum = inout(zmm_reg) *sum, x = in(zmm_reg) x, options(pure, nomem, nostack));
                }
            }
        }
        std::hint::black_box(sums);
        (rounds * SUMS * 32 * 2) as f64
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn int8(rounds: usize) -> f64 {
        let mut sums = [_mm512_setzero_si512(); SUMS];
        let x = std::hint::black_box(_mm512_set1_epi32(0x0101_0101));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, x, x);
            }
        }
        std::hint::black_box(sums);
        (rounds * SUMS * 64 * 2) as f64
    }
}
