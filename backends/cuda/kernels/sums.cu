// Checksums of what leaves without passing the host: CRC32C of rows, as backends/core/src/checksum.rs has it.
#include "device.cuh"

#define POLYNOMIAL 0x82f63b78u

struct SumArgs {
    u64 rows, tables, sums;  // [count, width] bytes; [4, 256] u32 further by a warp's words, [32] u32 from a lane's to the end; [count] u32
    u32 width, count;        // bytes of a row, a multiple of 4
};

// One warp a row: lane l sums words l, l + 32, ... of the row, before which there are zeros up to a whole number of rounds; then what a
// lane has is worth as much as there are bits behind its last word.
KERNEL(sum_rows, SumArgs, 256) {
    __shared__ u32 further[4 * 256];
    const u32* tables = (const u32*)a.tables;
    for (u32 i = threadIdx.x; i < 4 * 256; i += blockDim.x) further[i] = tables[i];
    __syncthreads();
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    u32 words = a.width / 4, end = (words + 31) / 32 * 32, before = end - words, to_end = tables[4 * 256 + lane];
    for (u32 row = blockIdx.x * warps + warp; row < a.count; row += gridDim.x * warps) {
        const u32* at = (const u32*)(a.rows + (u64)row * a.width);
        u32 sum = 0;
        for (u32 i = lane; i < end; i += 32) {
            sum = further[sum & 255] ^ further[256 + (sum >> 8 & 255)] ^ further[512 + (sum >> 16 & 255)] ^ further[768 + (sum >> 24)];
            // An empty sum is all ones: the first word's bits are turned.
            if (i >= before) sum ^= i == before ? ~at[0] : at[i - before];
        }
        u32 product = 0;
#pragma unroll
        for (int bit = 0; bit < 32; ++bit) {
            product = product >> 1 ^ (product & 1 ? POLYNOMIAL : 0u);
            product ^= to_end >> bit & 1 ? sum : 0u;
        }
        for (int mask = 16; mask > 0; mask /= 2) product ^= lane_xor(product, mask);
        if (lane == 0) ((u32*)a.sums)[row] = ~product;
    }
}
