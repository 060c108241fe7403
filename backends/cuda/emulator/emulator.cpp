// The emulated device: runs a kernel's blocks one after the other, and a block's threads as fibers in turn.
#include "../kernels/device.cuh"
#include <setjmp.h>
#include <algorithm>

Dim3 threadIdx, blockIdx, blockDim, gridDim;
u8* dynamic_shared_memory;

namespace {
const size_t STACK_BYTES = 64 * 1024;

// Entered by its context, afterwards by jumps: these make no system call.
struct Fiber {
    ucontext_t context;
    jmp_buf place;
    std::vector<u8> stack = std::vector<u8>(STACK_BYTES);
    bool begun = false, ended = false;
};

// Arrivals at a barrier; a thread that has ended no longer counts.
struct Barrier {
    u32 arrived = 0, turn = 0;
};

std::unordered_map<std::string, Kernel>& kernels() {
    static std::unordered_map<std::string, Kernel> all;
    return all;
}

std::vector<Fiber*> fibers;
jmp_buf scheduler;
u32 current, threads;
Barrier block;
std::vector<Barrier> warps;
std::vector<u8> exchanges;
Kernel running;
const void* arguments;

u32 alive(u32 from, u32 to) {
    return std::count_if(fibers.begin() + from, fibers.begin() + std::min(to, threads), [](Fiber* f) { return !f->ended; });
}

void wait_at(Barrier& barrier, u32 from, u32 to) {
    u32 turn = barrier.turn;
    ++barrier.arrived;
    while (barrier.turn == turn) {
        if (barrier.arrived >= alive(from, to)) {
            barrier.arrived = 0;
            ++barrier.turn;
            return;
        }
        give_way();
    }
}

void fiber_main() {
    running(arguments);
    fibers[current]->ended = true;
    _longjmp(scheduler, 1);
}

// Lets fiber `i` run until it gives way or ends.
void resume(u32 i) {
    current = i;
    threadIdx = {i, 0, 0};
    if (_setjmp(scheduler)) return;
    Fiber& fiber = *fibers[i];
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}
}  // namespace

Registered::Registered(const char* name, Kernel kernel) {
    kernels()[name] = kernel;
}

void give_way() {
    if (!_setjmp(fibers[current]->place)) _longjmp(scheduler, 1);
}

void block_barrier() {
    wait_at(block, 0, threads);
}

void warp_barrier() {
    u32 warp = current / 32;
    wait_at(warps[warp], warp * 32, warp * 32 + 32);
}

u8* exchange(int lane) {
    return exchanges.data() + (current / 32 * 32 + lane) * 64;
}

// 0: done; 1: no such kernel. One caller at a time.
extern "C" int emulator_launch(const char* name, const u32* grid, u32 count, u32 shared_bytes, const void* args) {
    auto found = kernels().find(name);
    if (found == kernels().end()) return 1;
    running = found->second;
    arguments = args;
    threads = count;
    // Contents are arbitrary on a device: not-a-number shows a read of what nobody wrote.
    std::vector<u8> shared(shared_bytes + 128);
    while (fibers.size() < count) fibers.push_back(new Fiber);
    exchanges.resize((count + 31) / 32 * 32 * 64);
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {count, 1, 1};
    for (u32 z = 0; z < grid[2]; ++z)
        for (u32 y = 0; y < grid[1]; ++y)
            for (u32 x = 0; x < grid[0]; ++x) {
                blockIdx = {x, y, z};
                std::fill(shared.begin(), shared.end(), 0xff);
                dynamic_shared_memory = (u8*)(((u64)shared.data() + 127) / 128 * 128);
                block = Barrier();
                warps.assign((count + 31) / 32, Barrier());
                for (u32 i = 0; i < count; ++i) {
                    Fiber& fiber = *fibers[i];
                    fiber.begun = fiber.ended = false;
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = fiber.stack.data();
                    fiber.context.uc_stack.ss_size = fiber.stack.size();
                    fiber.context.uc_link = nullptr;
                    makecontext(&fiber.context, fiber_main, 0);
                }
                for (bool left = true; left;) {
                    left = false;
                    for (u32 i = 0; i < count; ++i) {
                        if (fibers[i]->ended) continue;
                        left = true;
                        resume(i);
                    }
                }
            }
    return 0;
}
