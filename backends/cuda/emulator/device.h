// What the emulated device's two halves share: emulator.cpp runs fibers, checks.cpp judges their accesses.
#pragma once
#include "../kernels/device.cuh"
#include <string>

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
// Ends the running block: a wrong access is not made. Does not return.
void stop_block();
// The first failure of this launch; later ones are dropped. Does not return.
void checks_fail(const std::string& what);
const std::string& checks_failure();
