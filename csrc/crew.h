// How the threads of a call share its phases.
//
// A barrier waits for threads. Where another program takes a core for some milliseconds, a thread is away ten times longer than a
// phase takes, and all others would wait for it. So nobody waits for a thread here, only for work: a phase is over when all its
// items are done, whoever did them. A thread takes items of its own share, then of the others'; one that comes back late finds
// everything taken and hurries after them. The item that it had when it lost its core is taken from it (`retake`): work is computed
// into memory of the thread's own, and written only when its slot, which others may change, says that the item is still its.
//
// Results are the same bits whoever computes them, so none of this can be seen in them.
#pragma once
#include <sched.h>
#include <time.h>
#include "scratch.h"

namespace herd::HERD_ISA {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline int64_t nanoseconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// A slot: phase, item and what became of it. No item is held twice by one thread without having been lost, so words are unique.
enum Hold : uint64_t { NOTHING = 0, HELD = 1, WRITING = 2, LOST = 3 };
inline uint64_t slot_word(int64_t phase, int64_t item, Hold hold) { return uint64_t(phase) << 34 | uint64_t(item) << 2 | hold; }
inline uint64_t with(uint64_t word, Hold hold) { return (word & ~uint64_t(3)) | hold; }

inline bool swap(uint64_t* slot, uint64_t from, uint64_t to) {
    return __atomic_compare_exchange_n(slot, &from, to, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

// What an item asks before it writes its results.
class Turn {
public:
    Turn() = default;
    Turn(uint64_t* slot, uint64_t word) : slot_(slot), word_(word) {}
    bool alone() const { return !slot_; }  // nobody can take the item: results may be written as they come
    bool mine() const { return !slot_ || swap(slot_, word_, with(word_, WRITING)); }

private:
    uint64_t* slot_ = nullptr;
    uint64_t word_ = 0;
};

constexpr int64_t PER_THREAD = 8;  // what a thread's share is cut into, so that the last to finish is not late by much

// One thread's part in a call.
class Crew {
public:
    Crew(const Team& team, int me) : team_(team), me_(me) {}
    int64_t threads() const { return team_.threads; }

    // Calls work(i) once for every i in [0, n), on any thread; returns when all are done.
    template <typename Work> void share(int64_t n, const Work& work) {
        const int64_t grain = n / team_.threads / PER_THREAD;
        run<false>(n, grain < 1 ? 1 : grain, [&](int64_t i, const Turn&) { work(i); });
    }

    // The same, one at a time: for items that take far longer than it takes to fetch one.
    template <typename Work> void share_singly(int64_t n, const Work& work) {
        run<false>(n, 1, [&](int64_t i, const Turn&) { work(i); });
    }

    // The same with work(i, turn), which may be called again for an item whose thread is away, and writes only where turn.mine()
    // says so, once. What it reads may have changed meanwhile, then it is not its turn; sizes must be those of the whole call.
    template <typename Work> void retake(int64_t n, const Work& work) { run<true>(n, 1, work); }

private:
    static constexpr int64_t PATIENCE = 20000;  // ns that an item may take longer than twice the slowest of this thread

    template <bool AGAIN, typename Work> void run(int64_t n, int64_t grain, const Work& work) {
        const int64_t phase = phase_++;
        if (team_.threads == 1) {
            for (int64_t i = 0; i < n; ++i) work(i, Turn());
            return;
        }
        // A late thread may have read an `n` that later phases changed. It has, only if this phase is over.
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&team_.over->value, __ATOMIC_ACQUIRE) > phase) return;
        slowest_ /= 2;
        for (int64_t k = 0; k < team_.threads; ++k) {
            const int64_t whose = (me_ + k) % team_.threads, first = n * whose / team_.threads, last = n * (whose + 1) / team_.threads;
            int64_t* taken = &team_.taken[phase * team_.threads + whose].value;
            while (first + __atomic_load_n(taken, __ATOMIC_RELAXED) < last) {
                const int64_t at = first + __atomic_fetch_add(taken, grain, __ATOMIC_RELAXED);
                if (at < last) items<AGAIN>(phase, at, at + grain < last ? at + grain : last, work);
            }
        }
        wait<AGAIN>(phase, n, work);
        int64_t over = __atomic_load_n(&team_.over->value, __ATOMIC_RELAXED);
        while (over <= phase && !__atomic_compare_exchange_n(&team_.over->value, &over, phase + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
        __atomic_thread_fence(__ATOMIC_RELEASE);  // before what follows changes anything
    }

    template <bool AGAIN, typename Work> void items(int64_t phase, int64_t first, int64_t last, const Work& work) {
        const int64_t began = nanoseconds();
        if constexpr (AGAIN) {
            uint64_t* slot = reinterpret_cast<uint64_t*>(&team_.slot[me_].value);
            const uint64_t word = slot_word(phase, first, HELD);
            __atomic_store_n(slot, word, __ATOMIC_RELEASE);
            work(first, Turn(slot, word));
            if (__atomic_load_n(slot, __ATOMIC_RELAXED) != with(word, WRITING)) return;
        } else {
            for (int64_t i = first; i < last; ++i) work(i, Turn());
        }
        __atomic_fetch_add(&team_.done[phase].value, last - first, __ATOMIC_RELEASE);
        const int64_t time = nanoseconds() - began;
        slowest_ = time > slowest_ ? time : slowest_;
    }

    template <bool AGAIN, typename Work> void wait(int64_t phase, int64_t n, const Work& work) {
        const int64_t* done = &team_.done[phase].value;
        int64_t patience = -1;
        for (int spins = 1; __atomic_load_n(done, __ATOMIC_ACQUIRE) < n; ++spins) {
            relax();
            if (spins % 64) continue;
            const int64_t now = nanoseconds();
            if (patience < 0) patience = now + PATIENCE + 2 * slowest_;
            if (now < patience) continue;
            if (AGAIN && take_one<AGAIN>(phase, work)) continue;
            sched_yield();  // who has what is missing may be waiting for this very core
        }
    }

    // Takes what another thread holds in this phase and does it; false where there is nothing of the kind.
    template <bool AGAIN, typename Work> bool take_one(int64_t phase, const Work& work) {
        for (int64_t k = 1; k < team_.threads; ++k) {
            uint64_t* slot = reinterpret_cast<uint64_t*>(&team_.slot[(me_ + k) % team_.threads].value);
            const uint64_t word = __atomic_load_n(slot, __ATOMIC_ACQUIRE);
            if ((word & 3) != HELD || int64_t(word >> 34) != phase || !swap(slot, word, with(word, LOST))) continue;
            const int64_t item = word >> 2 & 0xffffffff;
            items<AGAIN>(phase, item, item + 1, work);
            return true;
        }
        return false;
    }

    const Team& team_;
    const int64_t me_;
    int64_t phase_ = 0, slowest_ = 0;
};

}  // namespace herd::HERD_ISA
