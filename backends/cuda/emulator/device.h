// What the parts of the emulated device share: emulator.cpp runs fibers, tensor.cpp has tensor memory and barriers in shared memory,
// checks.cpp judges accesses.
#pragma once
#include "../kernels/device.cuh"
#include <string>
#include <vector>

// Begins a launch, a block, and what lies between two barriers of a block or of a warp.
void checks_launch(const char* kernel, const void* args, u32 args_bytes, u8* stacks, u64 stacks_bytes);
void checks_block(u8* dynamic_shared, u32 bytes);
void checks_block_barrier();
void checks_warp_barrier(u32 warp);
// A thread's access to `size` bytes. Of what is neither shared memory nor the device's, only stacks and constants pass.
void checks_access(u64 at, u32 size, bool write);
// An addition to shared memory that others may make at the same time, and nobody else may touch.
void checks_add(u64 at, u32 size);
// Shared memory that a copy on its way will fill, and that it has filled.
void checks_pending(u64 at, u32 size);
void checks_landed(u64 at, u32 size);
// What this thread has written to shared memory is there for products from the next barrier on; a read of 16 bytes by one.
void checks_fence();
void checks_product(u64 at);
// Order by barriers in shared memory. What one has seen of another: how often it has arrived, and fenced before that.
struct Seen {
    u32 clock = 0, shared_fences = 0, tensor_fences = 0;
};
typedef std::vector<Seen> Known;
// What products may rely on: what was known, and by fences known of tensor memory, when they were asked for.
struct Order {
    Known shared, tensor;
    u32 time;
};
// This block has such barriers, or tensor memory.
void checks_barriers();
// Somebody in this block has given up waiting, and goes on regardless: only what lies outside of all memory is wrong from now on.
void checks_give_up();
bool checks_given_up();
// Whoever acts arrives at a barrier, a thread waits for it, fences tensor memory before the one and after the other.
void checks_release(Known& to);
void checks_acquire(const Known& from);
void checks_tensor_before();
void checks_tensor_after();
Order checks_order();
// From now on products act that were asked for so; null: threads again.
void checks_act(const Order* as);
u16 checks_actor();
Seen checks_own();
Seen checks_seen_tensor(u16 by);

// Lets other threads run until `ready`.
void give_way();
// Somebody goes on, so threads do not wait for each other for ever.
void moved();
template <typename Ready>
void wait_until(Ready ready) {
    while (!ready()) give_way();
    moved();
}
// All lanes of the warp are here.
void warp_meets();
// Where element `k` of line `line` of an operand lies, by its descriptor, whose bits from 46 on are `version`.
const bf16* tile_element(u64 tile, u32 version, int line, int k, bool turned);
float low_half(u32 pair);
float high_half(u32 pair);
// A new launch, of which one arrival at a barrier in shared memory never comes, counted from 1 (0: all come); a new block; what has been
// asked for up to the next arrival: false where there is nothing; whoever waits at a barrier gives up: false where nobody may; what is
// wrong with a block's end, or nothing.
void tensor_launch(u32 loses);
void tensor_block();
bool tensor_step();
bool tensor_time_passes();
const char* tensor_end();
// Whether a thread may end.
void tensor_thread_end();

// Ends the running block: a wrong access is not made. Does not return.
void stop_block();
// The first failure of this launch; later ones are dropped. Does not return.
void checks_fail(const std::string& what);
const std::string& checks_failure();
