// The steps of training (norm, gate, rotation, loss, attention of documents, and their gradients) of the instruction set argv[1]
// beside those of argv[2], for processors that are only emulated here. Prints for each what it is, how its numbers are stored, and
// the largest difference relative to the largest result.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>
#include "abi.h"
#include "formats.h"

extern "C" {
int herd_use(const char* name);
int64_t herd_pass_scratch(int threads);
void herd_pass(const herd::Pass* p, int threads, uint8_t* scratch);
int64_t herd_documents_scratch(const herd::Documents* d, int backward, int threads);
void herd_documents(const herd::Documents* d, int backward, int threads, uint8_t* scratch);
}

using Bytes = std::vector<uint8_t>;
using Results = std::vector<std::pair<std::string, std::vector<float>>>;

static const int64_t ROWS = 69, COLUMNS = 64, HEADS = 4, KV_HEADS = 2, DIM = 32;  // two parts of PASS_ROWS and a bit
static const std::vector<int64_t> BEGINS{0, 1, 6, 50, 51, ROWS};

// Numbers of -2 to 2, the same ones for every instruction set.
static std::vector<float> drawn(int64_t count, int seed) {
    std::mt19937 bits(seed);
    std::vector<float> x(count);
    for (float& f : x) f = float(int(bits() % 2001) - 1000) / 500.0f;
    return x;
}

static Bytes stored(int kind, const std::vector<float>& x) {
    const size_t size = kind == herd::F32 ? 4 : 2;
    Bytes bytes(x.size() * size);
    for (size_t i = 0; i < x.size(); ++i) std::memcpy(&bytes[i * size], reinterpret_cast<const uint8_t*>(&x[i]) + 4 - size, size);
    return bytes;
}

static Bytes input(int kind, int64_t count, int seed) { return stored(kind, drawn(count, seed)); }
static Bytes room(int kind, int64_t count) { return Bytes(count * (kind == herd::F32 ? 4 : 2)); }

static std::vector<float> numbers(int kind, const Bytes& bytes) {
    const size_t size = kind == herd::F32 ? 4 : 2;
    std::vector<float> x(bytes.size() / size, 0.0f);
    for (size_t i = 0; i < x.size(); ++i) std::memcpy(reinterpret_cast<uint8_t*>(&x[i]) + 4 - size, &bytes[i * size], size);
    return x;
}

struct Scratch {  // at a multiple of 64
    explicit Scratch(int64_t size) : bytes(size + 64) {}
    uint8_t* at() { return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) & ~uintptr_t(63)); }
    Bytes bytes;
};

static void over(herd::Pass pass, int threads) {
    Scratch scratch(herd_pass_scratch(threads));
    herd_pass(&pass, threads, scratch.at());
}

static void passes(int kind, int threads, Results& found) {
    const int64_t count = ROWS * COLUMNS;
    const Bytes a = input(kind, count, 1), b = input(kind, count, 2), weight = input(kind, COLUMNS, 3), grad = input(kind, count, 4);
    Bytes out = room(kind, count), by_a = room(kind, count), by_b = room(kind, count);
    std::vector<float> scales(ROWS), by_weight((ROWS + herd::PASS_ROWS - 1) / herd::PASS_ROWS * COLUMNS);
    herd::Pass p{};
    p.kind = kind, p.rows = ROWS, p.columns = COLUMNS, p.heads = 1, p.eps = 1e-5;
    p.a = a.data(), p.b = b.data(), p.weight = weight.data(), p.grad = grad.data();
    p.out = out.data(), p.scales = scales.data(), p.by_a = by_a.data(), p.by_b = by_b.data();

    p.what = herd::NORM, over(p, threads);
    found.push_back({"norm", numbers(kind, out)}), found.push_back({"scales", scales});
    p.what = herd::NORM_BACK, p.by_weight = by_weight.data(), over(p, threads), p.by_weight = nullptr;
    found.push_back({"norm_back", numbers(kind, by_a)}), found.push_back({"norm_weight", by_weight});
    p.what = herd::GATE, over(p, threads);
    found.push_back({"gate", numbers(kind, out)});
    p.what = herd::GATE_BACK, over(p, threads);
    found.push_back({"gate_a", numbers(kind, by_a)}), found.push_back({"gate_b", numbers(kind, by_b)});

    const std::vector<float> angles = drawn(ROWS * COLUMNS / 4, 5);  // two heads of half the columns
    std::vector<float> cos(angles.size()), sin(angles.size());
    for (size_t i = 0; i < angles.size(); ++i) cos[i] = std::cos(angles[i]), sin[i] = std::sin(angles[i]);
    p.what = herd::TURN, p.heads = 2, p.columns = COLUMNS / 2, p.cos = cos.data(), p.sin = sin.data();
    for (double way : {1.0, -1.0}) {
        p.eps = way, over(p, threads);
        found.push_back({way > 0 ? "turn" : "turn_back", numbers(kind, out)});
    }

    std::vector<int64_t> labels(ROWS);
    for (int64_t i = 0; i < ROWS; ++i) labels[i] = i * 7 % COLUMNS;
    std::vector<float> losses(ROWS);
    Bytes logits = a;  // become their gradient in place, as the caller has it
    p.what = herd::LEARN, p.heads = 1, p.columns = COLUMNS, p.labels = labels.data(), p.losses = losses.data();
    p.a = logits.data(), p.by_a = logits.data(), over(p, threads);
    found.push_back({"losses", losses}), found.push_back({"by_logits", numbers(kind, logits)});
}

static void documents(int kind, int threads, Results& found) {
    const int64_t wide = ROWS * HEADS * DIM, narrow = ROWS * KV_HEADS * DIM;
    const Bytes q = input(kind, wide, 6), k = input(kind, narrow, 7), v = input(kind, narrow, 8), grad = input(kind, wide, 9);
    Bytes out = room(kind, wide), by_k = room(kind, narrow), by_v = room(kind, narrow);
    std::vector<float> sums(ROWS * HEADS), by_q(wide);
    herd::Documents d{};
    d.kind = kind, d.heads = HEADS, d.kv_heads = KV_HEADS, d.head_dim = DIM;
    d.begins = BEGINS.data(), d.n_documents = int64_t(BEGINS.size()) - 1;
    d.q = q.data(), d.k = k.data(), d.v = v.data(), d.out = out.data(), d.sums = sums.data();
    d.grad = grad.data(), d.by_q = by_q.data(), d.by_k = by_k.data(), d.by_v = by_v.data();
    for (int backward : {0, 1}) {
        Scratch scratch(herd_documents_scratch(&d, backward, threads));
        herd_documents(&d, backward, threads, scratch.at());
    }
    found.push_back({"attention", numbers(kind, out)}), found.push_back({"attention_sums", sums});
    found.push_back({"attention_q", by_q});
    found.push_back({"attention_k", numbers(kind, by_k)}), found.push_back({"attention_v", numbers(kind, by_v)});
}

static Results results(const char* name, int kind, int threads) {
    if (!herd_use(name)) std::printf("no %s\n", name), std::exit(2);
    Results found;
    passes(kind, threads, found), documents(kind, threads, found);
    return found;
}

int main(int, char** arguments) {
    for (int kind : {herd::F32, herd::BF16}) {
        const Results expected = results(arguments[2], kind, 1), found = results(arguments[1], kind, 1);
        if (found != results(arguments[1], kind, 3)) return std::puts("threads change bits"), 1;
        for (size_t n = 0; n < found.size(); ++n) {
            double top = 0, off = 0;
            for (size_t i = 0; i < found[n].second.size(); ++i) {
                const double a = expected[n].second[i], b = found[n].second[i];
                top = std::fmax(top, std::fabs(a));
                off = std::fmax(off, std::isfinite(b) ? std::fabs(a - b) : INFINITY);
            }
            std::printf("%s %s %g\n", found[n].first.c_str(), kind == herd::F32 ? "float32" : "bfloat16", top ? off / top : INFINITY);
        }
    }
}
