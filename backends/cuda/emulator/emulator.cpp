// The emulated device: runs a kernel's blocks one after the other, and a block's threads as fibers in turn.
#include "device.h"
#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>
#include <algorithm>
#include <unordered_map>
#include <vector>

Registers registers;

namespace {
const u64 STACK_BYTES = 64 * 1024;
const u32 THREADS_MAX = 1024, GRID_MAX = 65535;

// 16 bytes on their way to shared memory.
struct Copy {
    void* to;
    const void* from;
    bool there;
    u32 group;
};

// A product of a warp group on its way: the registers of one thread.
struct Product {
    float* d;
    int tiles;  // of 8 columns
    const u32* x;
    u64 x_at, w_at;
    bool adds, turned;
    u32 group;
};

// Entered by its context, afterwards by jumps: these make no system call.
struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool begun = false, ended = false;
    std::vector<Copy> copies;
    std::vector<Product> products;
    u32 groups = 0, exchanges = 0, product_groups = 0;
    bool fenced = false;
};

// Arrivals at a barrier; a thread that has ended no longer counts.
struct Barrier {
    u32 arrived = 0, turn = 0;
};

struct Known {
    Kernel kernel;
    u32 threads;
};

std::unordered_map<std::string, Known>& kernels() {
    static std::unordered_map<std::string, Known> all;
    return all;
}

std::vector<Fiber> fibers(THREADS_MAX);
u8* stacks;
jmp_buf scheduler;
u32 current, threads;
u64 progress;
Barrier block;
Barrier warps[THREADS_MAX / 32], rendezvous[THREADS_MAX / 32], warp_groups[THREADS_MAX / 128];
// Two tables for each warp in turn: a lane may be one exchange ahead of another that still reads.
u8 tables[THREADS_MAX / 32][2][32][64];
Kernel running;
const void* arguments;

u32 alive(u32 from, u32 to) {
    return std::count_if(fibers.begin() + from, fibers.begin() + std::min(to, threads), [](Fiber& f) { return !f.ended; });
}
}  // namespace

void give_way() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

void moved() {
    ++progress;
}

namespace {
void wait_at(Barrier& barrier, u32 from, u32 to, void (*passed)(u32)) {
    u32 turn = barrier.turn;
    ++barrier.arrived;
    ++progress;
    while (barrier.turn == turn) {
        if (barrier.arrived >= alive(from, to)) {
            barrier.arrived = 0;
            ++barrier.turn;
            ++progress;
            if (passed) passed(from / 32);
            return;
        }
        give_way();
    }
}

void fiber_main() {
    running(arguments);
    if (!fibers[current].products.empty()) checks_fail("ended with products on their way");
    tensor_thread_end();
    fibers[current].ended = true;
    ++progress;
    _longjmp(scheduler, 1);
}

// Lets fiber `i` run until it gives way or ends.
void resume(u32 i) {
    current = i;
    registers.thread = {i, 0, 0};
    if (_setjmp(scheduler)) return;
    Fiber& fiber = fibers[i];
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}

// Runs the block; false when its threads wait for each other for ever.
bool run_block() {
    block = Barrier();
    for (u32 i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.begun = fiber.ended = false;
        fiber.copies.clear();
        fiber.products.clear();
        fiber.groups = fiber.exchanges = fiber.product_groups = 0;
        fiber.fenced = false;
        warps[i / 32] = rendezvous[i / 32] = warp_groups[i / 128] = Barrier();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks + i * STACK_BYTES;
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
    }
    for (bool left = true; left;) {
        left = false;
        u64 before = progress;
        for (u32 i = 0; i < threads; ++i) {
            if (fibers[i].ended) continue;
            left = true;
            resume(i);
            if (!checks_failure().empty()) return true;
        }
        if (left && progress == before) {
            // Only now, as late as can be, what tensor cores have been asked for. A failure ends up here, too.
            if (!_setjmp(scheduler) && !tensor_step() && !tensor_time_passes()) return false;
            if (!checks_failure().empty()) return true;
        }
    }
    return true;
}

float fp8_float(u8 code) {
    int exponent = code >> 3 & 15, fraction = code & 7;
    float x = exponent ? ldexpf(8.0f + fraction, exponent - 10) : ldexpf((float)fraction, -9);
    if ((code & 127) == 127) x = NAN;
    return code & 128 ? -x : x;
}
}  // namespace

float low_half(u32 pair) {
    return bits_float(pair << 16);
}

float high_half(u32 pair) {
    return bits_float(pair & 0xffff0000u);
}

void warp_meets() {
    const u32 warp = current / 32;
    wait_at(rendezvous[warp], warp * 32, warp * 32 + 32, nullptr);
}

Registered::Registered(const char* name, Kernel kernel, u32 threads) {
    kernels()[name] = {kernel, threads};
}

void stop_block() {
    _longjmp(scheduler, 1);
}

void block_barrier() {
    wait_at(block, 0, threads, [](u32) { checks_block_barrier(); });
}

void warp_sync() {
    u32 warp = current / 32;
    wait_at(warps[warp], warp * 32, warp * 32 + 32, checks_warp_barrier);
}

const u8* exchange(const void* mine, u32 bytes) {
    u32 warp = current / 32;
    auto& table = tables[warp][fibers[current].exchanges++ % 2];
    memcpy(table[current % 32], mine, bytes);
    wait_at(rendezvous[warp], warp * 32, warp * 32 + 32, nullptr);
    return table[0];
}

void tile_product(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    u32 mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const u8* all = exchange(mine, sizeof mine);
    for (int i = 0; i < 4; ++i) {
        int row = this_lane() / 4 + i / 2 * 8, column = this_lane() % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            // a: register by (row / 8, k / 8), lane by (row % 8, k % 8 / 2); b: register by k / 8.
            const u32* left = (const u32*)(all + (row % 8 * 4 + k % 8 / 2) * 64);
            const u32* right = (const u32*)(all + (column * 4 + k % 8 / 2) * 64);
            u32 x = left[row / 8 + k / 8 * 2], y = right[4 + k / 8];
            d[i] += k % 2 ? high_half(x) * high_half(y) : low_half(x) * low_half(y);
        }
    }
}

void tile_product_fp8(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    u32 mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const u8* all = exchange(mine, sizeof mine);
    for (int i = 0; i < 4; ++i) {
        int row = this_lane() / 4 + i / 2 * 8, column = this_lane() % 4 * 2 + i % 2;
        for (int k = 0; k < 32; ++k) {
            // As above, with four inputs in a word.
            const u32* left = (const u32*)(all + (row % 8 * 4 + k % 16 / 4) * 64);
            const u32* right = (const u32*)(all + (column * 4 + k % 16 / 4) * 64);
            u32 x = left[row / 8 + k / 16 * 2] >> (k % 4 * 8), y = right[4 + k / 16] >> (k % 4 * 8);
            d[i] += fp8_float((u8)x) * fp8_float((u8)y);
        }
    }
}

void load_matrices_of(u32 (&r)[4], const bf16* row, bool turned) {
    // The lane that names a row answers for it: 16 bytes at a multiple of so many.
    checks_access((u64)row, 16, false);
    const u8* all = exchange(&row, sizeof row);
    for (int i = 0; i < 4; ++i) {
        bf16 pair[2];
        for (int j = 0; j < 2; ++j) {
            int line = this_lane() / 4, column = this_lane() % 4 * 2 + j;
            const bf16* from;
            memcpy(&from, all + (i * 8 + (turned ? column : line)) * 64, sizeof from);
            pair[j] = from[turned ? line : column];
        }
        memcpy(&r[i], pair, 4);
    }
}

void load_aligned(void* to, const void* from, u32 bytes) {
    checks_access((u64)from, bytes, false);
    memcpy(to, from, bytes);
}

void store_aligned(void* to, const void* from, u32 bytes) {
    checks_access((u64)to, bytes, true);
    memcpy(to, from, bytes);
}

void shared_add(u64* at, u64 x) {
    checks_add((u64)at, sizeof *at);
    *at += x;
}

void copy_async(void* to, const void* from, bool there) {
    if (there) checks_access((u64)from, 16, false);
    else if ((u64)from % 16) checks_fail("a copy from a misaligned address");
    checks_pending((u64)to, 16);
    memset(to, 0xff, 16);
    Fiber& fiber = fibers[current];
    fiber.copies.push_back({to, from, there, fiber.groups});
}

void copies_commit() {
    ++fibers[current].groups;
}

void copies_wait_for(int left) {
    Fiber& fiber = fibers[current];
    auto arrived = [&](const Copy& copy) { return copy.group + left < fiber.groups; };
    for (Copy& copy : fiber.copies)
        if (arrived(copy)) {
            if (copy.there) memcpy(copy.to, copy.from, 16);
            else memset(copy.to, 0, 16);
            checks_landed((u64)copy.to, 16);
        }
    auto end = std::remove_if(fiber.copies.begin(), fiber.copies.end(), arrived);
    fiber.copies.erase(end, fiber.copies.end());
}

void shared_fence() {
    checks_fence();
}

void group_fence() {
    fibers[current].fenced = true;
}

void group_product_of(float* d, int tiles, const u32* x, u64 x_at, u64 w_at, bool adds, bool turned) {
    Fiber& fiber = fibers[current];
    if (!fiber.fenced) checks_fail("products without a fence before them");
    fiber.products.push_back({d, tiles, x, x_at, w_at, adds, turned, fiber.product_groups});
}

void group_commit() {
    ++fibers[current].product_groups;
}

// Where 16 bytes of a tile lie: pieces of 128 bytes are permuted by the address.
static const u8* permuted(u64 at) {
    return registers.dynamic_shared + (at ^ (at >> 7 & 7) << 4);
}

// Lines of 128 bytes in eights, or columns of them.
const bf16* tile_element(u64 tile, u32 version, int line, int k, bool turned) {
    const u64 begin = (tile & 0x3fff) << 4, leading = (tile >> 16 & 0x3fff) << 4, stride = (tile >> 32 & 0x3fff) << 4;
    if (tile >> 46 != version || tile & 0xc000c000) checks_fail("a tile that is not permuted by 128 bytes, or of another version");
    const u64 at = turned ? begin + line / 64 * leading + k / 8 * stride + k % 8 * 128 + line % 64 * 2
                          : begin + line / 8 * stride + line % 8 * 128 + k * 2;
    return (const bf16*)(permuted(at / 16 * 16) + at % 16);
}

static const bf16* element(u64 tile, int line, int k, bool turned) {
    return tile_element(tile, 1 << 16, line, k, turned);
}

static float value(bf16 x) {
    return bits_float((u32)x.bits << 16);
}

static void compute(const Product& product) {
    const int thread = current % 128, columns = product.tiles * 8;
    // Each thread of the group answers for its part of the operands.
    for (int piece = thread; piece < columns * 2; piece += 128)
        checks_product(product.turned ? (u64)element(product.w_at, piece / 16 * 8, piece % 16, true)
                                      : (u64)element(product.w_at, piece / 2, piece % 2 * 8, false));
    float x[2][16];
    if (product.x) {
        const u8* all = exchange(product.x, 16);
        for (int h = 0; h < 2; ++h)
            for (int k = 0; k < 16; ++k) {
                u32 pair = ((const u32*)(all + (this_lane() / 4 * 4 + k % 8 / 2) * 64))[h + k / 8 * 2];
                x[h][k] = k % 2 ? high_half(pair) : low_half(pair);
            }
    } else {
        checks_product((u64)element(product.x_at, thread / 2, thread % 2 * 8, false));
        for (int h = 0; h < 2; ++h)
            for (int k = 0; k < 16; ++k)
                x[h][k] = value(*element(product.x_at, thread / 32 * 16 + this_lane() / 4 + h * 8, k, false));
    }
    for (int n = 0; n < product.tiles; ++n)
        for (int i = 0; i < 4; ++i) {
            float& d = product.d[n * 4 + i];
            float sum = product.adds ? d : 0.0f;
            for (int k = 0; k < 16; ++k)
                sum += x[i / 2][k] * value(*element(product.w_at, n * 8 + this_lane() % 4 * 2 + i % 2, k, product.turned));
            d = sum;
        }
}

void group_wait_for(int left) {
    const u32 group = current / 128;
    wait_at(warp_groups[group], group * 128, group * 128 + 128, nullptr);
    Fiber& fiber = fibers[current];
    size_t done = 0;
    for (; done < fiber.products.size() && fiber.products[done].group + left < fiber.product_groups; ++done)
        compute(fiber.products[done]);
    fiber.products.erase(fiber.products.begin(), fiber.products.begin() + done);
    fiber.fenced = false;
}

// 0: done; else what is wrong is in `report`. `loses`: see tensor_launch. One caller at a time.
extern "C" int emulator_launch(const char* name, const u32* grid, u32 count, u32 shared_bytes, const void* args,
                               u32 args_bytes, u32 loses, char* report, u32 report_bytes) {
    auto say = [&](const std::string& what) {
        snprintf(report, report_bytes, "%s", what.c_str());
        return 1;
    };
    auto found = kernels().find(name);
    if (found == kernels().end()) return say("no such kernel");
    if (count > found->second.threads) return say(std::to_string(count) + " threads where registers are for " + std::to_string(found->second.threads));
    if (grid[1] > GRID_MAX || grid[2] > GRID_MAX) return say("a grid of more than 65,535 in y or z");
    if (!stacks) stacks = (u8*)aligned_alloc(4096, THREADS_MAX * STACK_BYTES);
    running = found->second.kernel;
    arguments = args;
    threads = count;
    std::vector<u8> shared(shared_bytes + 1024);
    u8* dynamic = (u8*)(((u64)shared.data() + 1023) / 1024 * 1024);
    registers.grid_size = {grid[0], grid[1], grid[2]};
    registers.block_size = {count, 1, 1};
    registers.dynamic_shared = dynamic;
    tensor_launch(loses);
    checks_launch(name, args, args_bytes, stacks, THREADS_MAX * STACK_BYTES);
    for (u32 z = 0; z < grid[2]; ++z)
        for (u32 y = 0; y < grid[1]; ++y)
            for (u32 x = 0; x < grid[0]; ++x) {
                registers.block = {x, y, z};
                checks_block(dynamic, shared_bytes);
                tensor_block();
                if (!run_block()) return say("threads wait for each other for ever, block " + std::to_string(x));
                if (!checks_failure().empty()) return say(checks_failure());
                if (const char* wrong = tensor_end()) return say(wrong);
            }
    return 0;
}
