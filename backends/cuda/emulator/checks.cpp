// What compute-sanitizer looks for, on the emulated device: accesses outside of allocations, misaligned ones, reads of
// shared memory that nobody wrote or that a copy is still filling, and accesses of two threads to one place, one of them a
// write, that no barrier orders. The kernels' loads and stores come here through the calls that `g++ -fsanitize=thread` puts
// in front of each.
#include "device.h"
#include <stdio.h>
#include <stdlib.h>
#include <algorithm>
#include <map>

extern u8 __start_baton_shared[] __attribute__((visibility("hidden")));
extern u8 __stop_baton_shared[] __attribute__((visibility("hidden")));
extern u8 __ehdr_start[] __attribute__((visibility("hidden")));
extern u8 _end[] __attribute__((visibility("hidden")));

namespace {
const u32 WARPS_MAX = 32, THREADS_MAX = 1024;
// What products of tensor memory do is done by nobody's thread.
const u16 PRODUCTS = THREADS_MAX;

// Of a byte of shared memory, or of two bytes of the device's. Times are counted over the whole process: barriers, blocks and
// launches all begin a new one, so that nothing needs to be reset.
struct Cell {
    u32 written, written_warp, read, read_warp;  // times; of the warp's own barriers
    u32 read_by_blocks;                          // launch in which several blocks read this
    u32 fences;                                  // of the writer, before it wrote
    u32 written_clock, read_clock;               // of the writer, of the reader
    u32 added;                                   // time of the last addition
    u16 writer, reader;
    u8 lanes, warps;  // whether several lanes, several warps have read since the last barrier
    u8 pending;
};

struct Region {
    u64 begin = 0, end = 0;
    u32 grain = 1;
    Cell* cells = nullptr;
};

std::map<u64, Region> allocations;  // by end
Region dynamic, fixed, *last;
u64 stacks_begin, stacks_end, args_begin, args_end;
u64 pending;  // bytes that copies will fill
u32 now = 1, launch_begin, block_begin, warp_times[WARPS_MAX + 1], fences[THREADS_MAX + 1];
std::string kernel, failure;

// Order by barriers in shared memory, for blocks that have them; by thread, PRODUCTS last. A thread's clock moves on as it arrives.
std::vector<Seen> own, at_block_barrier;
std::vector<Known> known, known_tensor;
const Order* acting;  // of the products that are done now
bool given_up;        // see checks_give_up

u16 actor() {
    return acting ? PRODUCTS : (u16)threadIdx.x;
}

size_t place_of(u16 who) {
    return who == PRODUCTS ? own.size() - 1 : who;
}

u32 clock_of(u16 who) {
    return own.empty() ? 0 : own[place_of(who)].clock;
}

void join(Seen& to, const Seen& from) {
    to.clock = std::max(to.clock, from.clock);
    to.shared_fences = std::max(to.shared_fences, from.shared_fences);
    to.tensor_fences = std::max(to.tensor_fences, from.tensor_fences);
}

// What the one who acts knows of another.
Seen seen(u16 by) {
    if (own.empty()) return Seen();
    if (acting) return acting->shared[place_of(by)];
    Seen all = known[threadIdx.x][place_of(by)];
    join(all, at_block_barrier[place_of(by)]);
    return all;
}

Cell* cells_of(u64 count) {
    // Pages that nobody touches cost nothing.
    Cell* cells = (Cell*)calloc(count, sizeof(Cell));
    if (!cells) abort();
    return cells;
}

bool within(u64 at, u32 size, u64 begin, u64 end) {
    return at >= begin && at + size <= end;
}

Region* region_of(u64 at, u32 size) {
    if (within(at, size, dynamic.begin, dynamic.end)) return &dynamic;
    if (within(at, size, fixed.begin, fixed.end)) return &fixed;
    if (last && within(at, size, last->begin, last->end)) return last;
    auto found = allocations.upper_bound(at);
    if (found == allocations.end() || !within(at, size, found->second.begin, found->second.end)) return nullptr;
    return last = &found->second;
}

std::string name(const Region* region, u64 at) {
    char text[96];
    const char* what = region == &dynamic ? "dynamic shared" : region == &fixed ? "shared" : "device";
    snprintf(text, sizeof text, "byte %llu of %llu of %s memory", at - region->begin, region->end - region->begin, what);
    return text;
}

// Whether an access of thread `by` at these times comes before what this thread does now.
bool ordered(u32 time, u32 warp_time, u32 clock, u16 by, u16 me, bool several_lanes, bool several_warps) {
    if (time < (acting ? acting->time : now)) return true;
    if (!several_lanes && !several_warps && seen(by).clock > clock) return true;
    if (several_warps || by / 32 != me / 32) return false;
    if (by == me && !several_lanes) return true;
    return warp_time < warp_times[me / 32];
}

void check_cell(Region* region, u64 at, Cell& cell, bool write) {
    if (given_up) return;
    const bool shared = region == &dynamic || region == &fixed;
    const u16 me = actor();
    if (shared && cell.pending) return checks_fail("while a copy fills it: " + name(region, at));
    if (shared && !write && cell.written < block_begin) return checks_fail("read before anybody wrote " + name(region, at));
    if (shared && cell.added == now) return checks_fail("race with an addition: " + name(region, at));
    const bool by_other_block = cell.written >= launch_begin && cell.written < block_begin;
    if (!shared && by_other_block) return checks_fail("another block has written " + name(region, at));
    if (cell.written >= block_begin && !ordered(cell.written, cell.written_warp, cell.written_clock, cell.writer, me, false, false))
        return checks_fail("race with a write of thread " + std::to_string(cell.writer) + ": " + name(region, at));
    if (write) {
        const bool read_elsewhere = cell.read_by_blocks == launch_begin || (cell.read >= launch_begin && cell.read < block_begin);
        if (!shared && read_elsewhere) return checks_fail("another block has read " + name(region, at));
        if (cell.read >= block_begin && !ordered(cell.read, cell.read_warp, cell.read_clock, cell.reader, me, cell.lanes, cell.warps))
            return checks_fail("race with a read of thread " + std::to_string(cell.reader) + ": " + name(region, at));
        cell.written = now;
        cell.written_warp = warp_times[me / 32];
        cell.writer = me;
        cell.written_clock = clock_of(me);
        cell.fences = fences[me];
        return;
    }
    if (cell.read >= launch_begin && cell.read < block_begin) cell.read_by_blocks = launch_begin;
    if (cell.read < now) cell.lanes = cell.warps = 0;
    else if (cell.reader / 32 != me / 32) cell.warps = 1;
    // What lanes have read before the warp's last barrier is past for all of them.
    else if (!cell.warps && cell.read_warp < warp_times[me / 32]) cell.lanes = 0;
    else if (cell.reader != me) cell.lanes = 1;
    cell.read = now;
    cell.read_warp = warp_times[me / 32];
    cell.reader = me;
    cell.read_clock = clock_of(me);
}
}  // namespace

void checks_launch(const char* name, const void* args, u32 args_bytes, u8* stacks, u64 stacks_bytes) {
    kernel = name;
    failure.clear();
    args_begin = (u64)args, args_end = args_begin + args_bytes;
    stacks_begin = (u64)stacks, stacks_end = stacks_begin + stacks_bytes;
    launch_begin = ++now;
    if (!fixed.cells) {
        fixed.begin = (u64)__start_baton_shared, fixed.end = (u64)__stop_baton_shared;
        fixed.cells = cells_of(fixed.end - fixed.begin);
    }
}

void checks_block(u8* shared, u32 bytes) {
    block_begin = ++now;
    if (dynamic.end - dynamic.begin < bytes || !dynamic.cells) {
        free(dynamic.cells);
        dynamic.cells = cells_of(bytes + 1);
    }
    dynamic.begin = (u64)shared, dynamic.end = dynamic.begin + bytes;
    memset((void*)fixed.begin, 0xff, fixed.end - fixed.begin);
    memset((void*)dynamic.begin, 0xff, bytes);
    for (u32& time : warp_times) time = now;
    // A block that ended with copies on their way leaves their marks.
    if (pending)
        for (u64 i = 0; i < bytes; ++i) dynamic.cells[i].pending = 0;
    pending = 0;
    own.clear();
    acting = nullptr;
    given_up = false;
}

void checks_block_barrier() {
    ++now;
    // Everybody knows now what anybody knew.
    for (size_t i = 0; i < own.size(); ++i) {
        for (const Known& of : known) join(at_block_barrier[i], of[i]);
        if (i == place_of(PRODUCTS)) continue;
        ++own[i].clock;
        own[i].shared_fences = fences[i];
        join(at_block_barrier[i], own[i]);
    }
}

void checks_warp_barrier(u32 warp) {
    static u32 times = 0x40000000;
    warp_times[warp] = ++times;
}

void checks_access(u64 at, u32 size, bool write) {
    if (within(at, size, stacks_begin, stacks_end) || within(at, size, args_begin, args_end)) return;
    Region* region = region_of(at, size);
    if (!region) {
        // Registers and constants of the library itself. g++ leaves the shared memory of templates among what is its own, unseen.
        const bool ours = within(at, size, (u64)__ehdr_start, (u64)_end);
        if (ours && write) return checks_fail("a write to what is no shared memory here: that of a template?");
        if (ours) return;
        char text[96];
        snprintf(text, sizeof text, "%s of %u bytes outside of all memory, at %llx", write ? "write" : "read", size, at);
        return checks_fail(text);
    }
    if (at % size) return checks_fail("misaligned access of " + std::to_string(size) + " bytes: " + name(region, at));
    for (u64 i = at; i < at + size; i += region->grain)
        check_cell(region, i, region->cells[(i - region->begin) / region->grain], write);
}

void checks_add(u64 at, u32 size) {
    Region* region = region_of(at, size);
    const bool shared = region == &dynamic || region == &fixed;
    if (!shared || at % size) return checks_fail("an addition outside of shared memory, or misaligned");
    for (u64 i = at; i < at + size; i += region->grain) {
        Cell& cell = region->cells[(i - region->begin) / region->grain];
        if (cell.written < block_begin) return checks_fail("added to before anybody wrote " + name(region, i));
        if (cell.written == now || cell.read == now || cell.pending)
            return checks_fail("race of an addition: " + name(region, i));
        cell.added = now;
    }
}

void checks_pending(u64 at, u32 size) {
    checks_access(at, size, true);
    Region* region = region_of(at, size);
    if (!region) return;
    for (u64 i = at; i < at + size; ++i) region->cells[(i - region->begin) / region->grain].pending = 1;
    pending += size;
}

void checks_landed(u64 at, u32 size) {
    Region* region = region_of(at, size);
    if (!region) return;
    for (u64 i = at; i < at + size; ++i) region->cells[(i - region->begin) / region->grain].pending = 0;
    pending -= size;
    checks_access(at, size, true);
}

void checks_fence() {
    ++fences[threadIdx.x];
}

void checks_product(u64 at) {
    checks_access(at, 16, false);
    Region* region = region_of(at, 16);
    for (u64 i = at; region && i < at + 16; i += region->grain) {
        const Cell& cell = region->cells[(i - region->begin) / region->grain];
        const u32 shown = acting ? seen(cell.writer).shared_fences : fences[cell.writer];
        if (shown <= cell.fences && !given_up) checks_fail("no fence has shown products " + name(region, i));
    }
}

void checks_barriers() {
    if (!own.empty()) return;
    own.assign(blockDim.x + 1, Seen());
    at_block_barrier.assign(blockDim.x + 1, Seen());
    known.assign(blockDim.x, Known(blockDim.x + 1));
    known_tensor.assign(blockDim.x, Known(blockDim.x + 1));
}

void checks_give_up() {
    given_up = true;
}

bool checks_given_up() {
    return given_up;
}

void checks_release(Known& to) {
    to.resize(own.size());
    Seen& mine = own[place_of(actor())];
    ++mine.clock;
    if (!acting) mine.shared_fences = fences[threadIdx.x];
    const Known all = acting ? acting->shared : checks_order().shared;
    for (size_t i = 0; i < own.size(); ++i) join(to[i], all[i]);
    join(to[place_of(actor())], mine);
}

void checks_acquire(const Known& from) {
    for (size_t i = 0; i < from.size(); ++i) join(known[threadIdx.x][i], from[i]);
}

void checks_tensor_before() {
    ++own[threadIdx.x].tensor_fences;
}

void checks_tensor_after() {
    for (size_t i = 0; i < own.size(); ++i) {
        known_tensor[threadIdx.x][i] = known[threadIdx.x][i];
        join(known_tensor[threadIdx.x][i], at_block_barrier[i]);
    }
}

Order checks_order() {
    Order order = {known[threadIdx.x], known_tensor[threadIdx.x], now};
    for (size_t i = 0; i < own.size(); ++i) join(order.shared[i], at_block_barrier[i]);
    join(order.shared[threadIdx.x], own[threadIdx.x]);
    return order;
}

void checks_act(const Order* as) {
    acting = as;
}

u16 checks_actor() {
    return actor();
}

Seen checks_own() {
    return own[place_of(actor())];
}

Seen checks_seen_tensor(u16 by) {
    return (acting ? acting->tensor : known_tensor[threadIdx.x])[place_of(by)];
}

void checks_fail(const std::string& what) {
    char place[128];
    const char* whose = acting ? "products of " : "";
    snprintf(place, sizeof place, "block %u,%u,%u %sthread %u: ", blockIdx.x, blockIdx.y, blockIdx.z, whose, threadIdx.x);
    failure = place + what;
    stop_block();
}

const std::string& checks_failure() {
    return failure;
}

// Memory of the device, or of the host where the device reaches it.
extern "C" void emulator_memory(u64 at, u64 bytes, int there) {
    last = nullptr;
    auto found = allocations.find(at + bytes);
    if (found != allocations.end()) {
        free(found->second.cells);
        allocations.erase(found);
    }
    if (!there) return;
    Region region;
    region.begin = at, region.end = at + bytes, region.grain = 2, region.cells = cells_of(bytes / 2 + 1);
    allocations[region.end] = region;
}

// g++ itself has put single bytes together.
static void bytewise(void* at, u32 size, bool write) {
    for (u32 i = 0; i < size; ++i) checks_access((u64)at + i, 1, write);
}

// What g++ calls before every load and store of a kernel.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define ACCESS(size)                                                                  \
    void __tsan_read##size(void* at) { checks_access((u64)at, size, false); }          \
    void __tsan_write##size(void* at) { checks_access((u64)at, size, true); }          \
    void __tsan_unaligned_read##size(void* at) { bytewise(at, size, false); }          \
    void __tsan_unaligned_write##size(void* at) { bytewise(at, size, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* at, u64 size) {
    for (u64 i = 0; i < size; i += 4) checks_access((u64)at + i, 4, false);
}
void __tsan_write_range(void* at, u64 size) {
    for (u64 i = 0; i < size; i += 4) checks_access((u64)at + i, 4, true);
}
}
