// A library with NCCL's calls for groups whose ranks are threads of one process and whose devices are the host's memory. It is
// as strict as NCCL's documentation: ranks sum the same things in the same order, whether a sum is captured is the same on all
// of them, graphs that are replayed together were captured together, and a group is not given up before its graphs are.
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <string>
#include <vector>

struct Id {
    char bytes[128];
};

// What the emulated device gives as a stream: src/emulator/stream.rs.
struct Stream {
    int capturing;
    void (*queue)(Stream*, void* what, int (*run)(void*, char*, uint32_t), void (*drop)(void*));
};

struct Comm;

// What a rank has queued, or captured.
struct Sum {
    Comm* comm;
    void* at;
    size_t count;
    int type;
    bool captured;
    uint64_t together;  // of captured sums that have been replayed: the same number on all ranks
};

struct Group {
    int world = 0, arrived = 0, turn = 0, joined = 0;
    std::vector<Sum*> parts;
    std::vector<unsigned char> sum;
    std::string wrong;  // what ranks disagreed about
};

struct Comm {
    Group* group;
    int rank;
    bool aborted;  // this rank's end: the others' wait on
    int graphs;    // captured sums that are there
};

// Never destroyed: a process may end while a rank still waits.
static std::mutex& mutex = *new std::mutex;
static std::condition_variable& changed = *new std::condition_variable;
static std::map<uint64_t, Group>& groups = *new std::map<uint64_t, Group>;
static uint64_t ids = 0, togethers = 0;
static int sums = 0, open_ends = 0;

template <typename T>
static void add(Group& group, size_t count) {
    group.sum.assign(count * sizeof(T), 0);
    T* sum = (T*)group.sum.data();
    for (Sum* part : group.parts)
        for (size_t i = 0; i < count; ++i) sum[i] += ((const T*)part->at)[i];
}

static std::string words(const Sum* sum) {
    return "rank " + std::to_string(sum->comm->rank) + (sum->captured ? " replays" : " queues") + " a sum of " +
           std::to_string(sum->count) + (sum->type == 7 ? " f32" : " u32");
}

// All ranks have come: whether they mean the same.
static void meet(Group& group) {
    Sum* first = group.parts[0];
    for (Sum* part : group.parts) {
        if (part->count != first->count || part->type != first->type || part->captured != first->captured) {
            group.wrong = words(first) + ", " + words(part);
        } else if (part->together != first->together) {
            group.wrong = words(first) + ", " + words(part) + ": not captured together";
        }
    }
    if (!group.wrong.empty()) return;
    if (first->captured && !first->together) {
        ++togethers;
        for (Sum* part : group.parts) part->together = togethers;
    }
    if (first->type == 7) add<float>(group, first->count);
    else add<uint32_t>(group, first->count);
    // All parts are read before anybody writes.
    for (Sum* part : group.parts) memcpy(part->at, group.sum.data(), group.sum.size());
}

// On the device, when its turn comes.
static int run(void* what, char* report, uint32_t bytes) {
    std::unique_lock<std::mutex> lock(mutex);
    Sum* sum = (Sum*)what;
    Comm* comm = sum->comm;
    Group& group = *comm->group;
    if (comm->aborted) return 2;
    ++sums;
    group.parts[comm->rank] = sum;
    int turn = group.turn;
    if (++group.arrived == group.world) {
        meet(group);
        group.arrived = 0;
        ++group.turn;
        changed.notify_all();
    }
    changed.wait(lock, [&] { return group.turn != turn || comm->aborted; });
    if (group.turn == turn) return 2;
    if (group.wrong.empty()) return 0;
    snprintf(report, bytes, "%s", group.wrong.c_str());
    return 3;
}

static void drop(void* what) {
    std::lock_guard<std::mutex> lock(mutex);
    Sum* sum = (Sum*)what;
    if (sum->captured) {
        --sum->comm->graphs;
        changed.notify_all();
    }
    delete sum;
}

extern "C" {
int ncclGetVersion(int* version) {
    *version = 22700;
    return 0;
}

int ncclGetUniqueId(Id* id) {
    std::lock_guard<std::mutex> lock(mutex);
    memset(id, 0, sizeof *id);
    ++ids;
    memcpy(id, &ids, 8);
    return 0;
}

int ncclCommInitRank(Comm** comm, int world, Id id, int rank) {
    std::unique_lock<std::mutex> lock(mutex);
    uint64_t key;
    memcpy(&key, &id, 8);
    Group& group = groups[key];
    group.world = world;
    group.parts.resize(world);
    ++group.joined;
    changed.notify_all();
    changed.wait(lock, [&] { return group.joined == world; });
    *comm = new Comm{&group, rank, false, 0};
    ++open_ends;
    return 0;
}

int ncclAllReduce(const void*, void* to, size_t count, int type, int, Comm* comm, void* stream_) {
    Stream* stream = (Stream*)stream_;
    Sum* sum = new Sum{comm, to, count, type, stream->capturing != 0, 0};
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (comm->aborted) {
            delete sum;
            return 2;
        }
        comm->graphs += sum->captured;
    }
    stream->queue(stream, sum, run, drop);
    return 0;
}

// Its memory stays: sums that nobody runs any more may still lie in a lane.
int ncclCommAbort(Comm* comm) {
    std::unique_lock<std::mutex> lock(mutex);
    comm->aborted = true;
    changed.notify_all();
    changed.wait(lock, [&] { return comm->graphs == 0; });
    --open_ends;
    changed.notify_all();
    return 0;
}

int ncclCommGetAsyncError(Comm*, int* status) {
    *status = 0;
    return 0;
}

const char* ncclGetErrorString(int) {
    return "an unhandled error";
}

int mock_sums() {
    return sums;
}

// Ends of groups that have not been given up, within `most` until there are `want`.
int mock_open_ends(int want, int most_ms) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait_for(lock, std::chrono::milliseconds(most_ms), [&] { return open_ends <= want; });
    return open_ends;
}
}
