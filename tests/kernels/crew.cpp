// Threads that are away at the worst moments: exit code 0 when every phase was still computed, once and in time.
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>
#define HERD_ISA tested
#include "crew.h"

using namespace herd;
using herd::tested::Crew;
using herd::tested::Turn;

constexpr int64_t AWAY = 300'000'000, THREADS = 3, PHASES = 40, ITEMS = 50;

static void sleep(int64_t ns) {
    timespec t{ns / 1000000000, ns % 1000000000};
    nanosleep(&t, nullptr);
}

int main() {
    std::vector<Count> all(PHASES * THREADS + PHASES + THREADS + 1);
    std::memset(static_cast<void*>(all.data()), 0, all.size() * sizeof(Count));
    Count* at = all.data();
    const Team team{THREADS, at, at + PHASES * THREADS, at + PHASES * THREADS + PHASES, at + PHASES * THREADS + PHASES + THREADS};
    std::vector<int> written(PHASES * ITEMS), shared(PHASES * ITEMS);
    std::vector<int64_t> over(THREADS);
    bool asleep = false;
    const int64_t began = herd::tested::nanoseconds();
    auto member = [&](int me) {
        Crew crew(team, me);
        for (int64_t p = 0; p < PHASES; p += 2) {
            // Thread 2 falls asleep in the midst of its first item, and thread 1 before it even comes to the second phase.
            if (me == 1 && p == 2) sleep(AWAY);
            crew.retake(ITEMS, [&](int64_t i, const Turn& turn) {
                if (me == 2 && p == 0 && !__atomic_exchange_n(&asleep, true, __ATOMIC_ACQ_REL)) sleep(AWAY);
                while (!__atomic_load_n(&asleep, __ATOMIC_ACQUIRE)) sched_yield();  // the others hold their first items until it does
                if (turn.mine()) __atomic_fetch_add(&written[p * ITEMS + i], 1, __ATOMIC_RELAXED);
            });
            for (int64_t i = 0; i < ITEMS; ++i)
                if (__atomic_load_n(&written[p * ITEMS + i], __ATOMIC_RELAXED) != 1) {
                    std::puts("a phase ended before an item was written, or it was written twice");
                    std::_Exit(1);
                }
            crew.share(ITEMS, [&](int64_t i) { __atomic_fetch_add(&shared[p * ITEMS + i], 1, __ATOMIC_RELAXED); });
        }
        over[me] = herd::tested::nanoseconds() - began;
    };
    std::vector<std::thread> others;
    for (int i = 1; i < THREADS; ++i) others.emplace_back(member, i);
    member(0);
    for (auto& t : others) t.join();
    for (int64_t p = 0; p < PHASES; p += 2)
        for (int64_t i = 0; i < ITEMS; ++i)
            if (written[p * ITEMS + i] != 1 || shared[p * ITEMS + i] != 1) return std::puts("not once"), 1;
    std::printf("%lld %lld\n", static_cast<long long>(over[0]), static_cast<long long>(AWAY));
    return 0;
}
