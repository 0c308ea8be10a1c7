// the decode attention kernel of the CPU backend against attention in double precision, with upstream's kernel beside it
//
//   test-attn [quick]

#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-cpu-attn.h"

#include "test-check.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

static int n_case = 0;

enum mask_kind { MASK_NONE, MASK_CAUSAL, MASK_HOLES, MASK_TILES, MASK_ROW, MASK_BIAS, MASK_HEADS, MASK_OWNERS, MASK_KINDS };

static const char * mask_names[MASK_KINDS] = { "none", "causal", "holes", "tiles", "row", "bias", "heads", "owners" };

struct shape {
    ggml_type k_type = GGML_TYPE_F16;
    ggml_type v_type = GGML_TYPE_F16;

    int64_t dk = 64;
    int64_t dv = 64;

    int64_t n_kv      = 256;
    int64_t n_q       = 1;
    int64_t group     = 1;
    int64_t n_head_kv = 2;
    int64_t n_seq     = 1;
    int     span      = 0; // query tokens of each of the sequences that share the keys; 0: all

    mask_kind mask = MASK_NONE;

    float max_bias = 0.0f;
    float softcap  = 0.0f;
    bool  sinks    = false;
    bool  per_head = false; // a head's rows follow each other, not a key's heads

    int64_t n_head() const { return group*n_head_kv; }

    std::string name() const {
        char buf[256];
        snprintf(buf, sizeof(buf), "k %s v %s dk %d dv %d n_kv %d n_q %d heads %dx%d seq %d mask %s bias %g cap %g sinks %d per_head %d",
            ggml_type_name(k_type), ggml_type_name(v_type), (int) dk, (int) dv, (int) n_kv, (int) n_q, (int) n_head_kv, (int) group, (int) n_seq,
            mask_names[mask], max_bias, softcap, sinks, per_head);
        return buf;
    }
};

struct input {
    std::vector<float>       q;     // [n_seq][n_head][n_q][dk]
    std::vector<uint8_t>     k;     // rows of the cache, [n_seq][n_kv][n_head_kv][dk]
    std::vector<uint8_t>     v;
    std::vector<ggml_fp16_t> mask;  // [n_seq][1 or n_head][n_q][n_kv]
    std::vector<float>       sinks; // [n_head]
};

struct output {
    std::vector<float> out;    // [n_seq][n_q][n_head][dv]
    std::vector<float> scores; // [n_seq][n_head_kv][n_kv + pad]
};

static const int64_t scores_pad = 5;
static const float   poison     = std::numeric_limits<float>::quiet_NaN();

static ggml_backend_t backend;
static ggml_backend_set_n_threads_t set_n_threads;

static std::vector<uint8_t> quantize(const std::vector<float> & x, ggml_type type, int64_t n_per_row) {
    std::vector<uint8_t> res(x.size()/n_per_row*ggml_row_size(type, n_per_row));
    if (type == GGML_TYPE_F32) {
        memcpy(res.data(), x.data(), res.size());
    } else {
        ggml_quantize_chunk(type, x.data(), res.data(), 0, x.size()/n_per_row, n_per_row, nullptr);
    }
    return res;
}

static std::vector<float> dequantize(const std::vector<uint8_t> & x, ggml_type type, int64_t n) {
    std::vector<float> res(n);
    if (type == GGML_TYPE_F32) {
        memcpy(res.data(), x.data(), n*sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(x.data(), res.data(), n);
    }
    return res;
}

static input make_input(const shape & s, uint32_t seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform;

    const auto draw = [&](int64_t n, float scale) {
        std::vector<float> res(n);
        for (auto & x : res) {
            x = scale*normal(rng);
        }
        return res;
    };

    input in;
    in.q     = draw(s.n_seq*s.n_head()*s.n_q*s.dk, 1.5f);
    in.k     = quantize(draw(s.n_seq*s.n_kv*s.n_head_kv*s.dk, 1.0f), s.k_type, s.dk);
    in.v     = quantize(draw(s.n_seq*s.n_kv*s.n_head_kv*s.dv, 1.0f), s.v_type, s.dv);
    in.sinks = draw(s.n_head(), 2.0f);

    if (s.mask == MASK_NONE) {
        return in;
    }

    const int64_t n_mask_head = s.mask == MASK_HEADS ? s.n_head() : 1;

    in.mask.resize(s.n_seq*n_mask_head*s.n_q*s.n_kv);

    for (int64_t i_row = 0; i_row < s.n_seq*n_mask_head*s.n_q; ++i_row) {
        const int64_t i_q   = i_row % s.n_q;
        const int64_t i_seq = i_row/(s.n_q*n_mask_head);

        for (int64_t j = 0; j < s.n_kv; ++j) {
            bool  seen = true;
            float bias = s.max_bias > 0.0f ? -(float) (s.n_kv - 1 - j) : 0.0f;
            switch (s.mask) {
                case MASK_CAUSAL: seen = j <= s.n_kv - s.n_q + i_q; break;
                case MASK_HEADS:
                case MASK_HOLES:  seen = uniform(rng) < 0.7f; break;
                case MASK_TILES:  seen = (j/64 + i_seq) % 3 == 1 || j + 3 > s.n_kv; break;
                case MASK_ROW:    seen = i_q != s.n_q/2; break;
                case MASK_OWNERS: seen = (j/64*7 + 3) % s.n_q == i_q && (j < s.n_kv - 40 || uniform(rng) < 0.5f); break; // pages of several sequences
                case MASK_BIAS:   bias -= uniform(rng); break;
                default: break;
            }
            in.mask[i_row*s.n_kv + j] = ggml_fp32_to_fp16(seen ? bias : -INFINITY);
        }
    }
    return in;
}

// first < 0: without scores
static output compute(const shape & s, const input & in, bool ours, int n_threads, int first = -1, float decay = 1.0f, float * gate = nullptr) {
    const int64_t n_head = s.n_head();

    ggml_init_params ip = { 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    ggml_context * ctx = ggml_init(ip);

    output res;
    res.out.assign(s.n_seq*s.n_q*n_head*s.dv, poison);
    res.scores.assign(s.n_seq*s.n_head_kv*(s.n_kv + scores_pad), poison);

    std::vector<float> sinks = in.sinks;

    const auto cache = [&](ggml_type type, int64_t d, const std::vector<uint8_t> & data) {
        ggml_tensor * t = ggml_new_tensor_4d(ctx, type, d, s.n_kv, s.n_head_kv, s.n_seq);
        const size_t row = ggml_row_size(type, d);
        t->nb[1] = s.per_head ? row : row*s.n_head_kv;
        t->nb[2] = s.per_head ? row*s.n_kv : row;
        t->data  = const_cast<uint8_t *>(data.data());
        return t;
    };

    ggml_tensor * q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, s.dk, s.n_q, n_head, s.n_seq);
    q->data = const_cast<float *>(in.q.data());

    ggml_tensor * k = cache(s.k_type, s.dk, in.k);
    ggml_tensor * v = cache(s.v_type, s.dv, in.v);

    ggml_tensor * mask = nullptr;
    if (s.mask != MASK_NONE) {
        mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.n_kv, s.n_q, s.mask == MASK_HEADS ? n_head : 1, s.n_seq);
        mask->data = const_cast<ggml_fp16_t *>(in.mask.data());
    }

    ggml_tensor * cur = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f/sqrtf((float) s.dk), s.max_bias, s.softcap);
    cur->data = res.out.data();

    if (s.sinks) {
        ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_head);
        t->data = sinks.data();
        ggml_flash_attn_ext_add_sinks(cur, t);
    }
    if (ours) {
        ggml_cpu_attn_enable(cur, s.mask == MASK_OWNERS && s.n_q > 8 ? GGML_CPU_ATTN_MANY : GGML_CPU_ATTN_ON);
    }
    if (first >= 0) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.n_kv + scores_pad, s.n_head_kv, s.n_seq);
        t->data = res.scores.data();
        ggml_cpu_attn_set_scores(cur, t, first, decay, s.span);
    }
    if (gate) {
        ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1);
        t->data = gate;
        ggml_cpu_attn_set_gate(cur, t);
    }

    ggml_cgraph * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, cur);

    set_n_threads(backend, n_threads);
    CHECK(ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS, "%s", s.name().c_str());

    ggml_free(ctx);
    return res;
}

struct exact {
    std::vector<double> out;
    std::vector<double> weights; // [n_seq][n_head_kv][n_kv]
    std::vector<double> total;   // [n_seq][n_head_kv]: what they add up to
};

static exact reference(const shape & s, const input & in, int first, float decay) {
    const int64_t n_head = s.n_head();

    const auto k = dequantize(in.k, s.k_type, s.n_seq*s.n_kv*s.n_head_kv*s.dk);
    const auto v = dequantize(in.v, s.v_type, s.n_seq*s.n_kv*s.n_head_kv*s.dv);

    exact res;
    res.out    .assign(s.n_seq*s.n_q*n_head*s.dv, 0.0);
    res.weights.assign(s.n_seq*s.n_head_kv*s.n_kv, 0.0);
    res.total  .assign(s.n_seq*s.n_head_kv, 0.0);

    int64_t n_head_log2 = 1;
    while (2*n_head_log2 <= n_head) {
        n_head_log2 *= 2;
    }

    std::vector<double> p(s.n_kv);

    for (int64_t i_seq = 0; i_seq < s.n_seq; ++i_seq)
    for (int64_t h = 0; h < n_head; ++h)
    for (int64_t t = 0; t < s.n_q; ++t) {
        const int64_t h_kv = h/s.group;

        const double slope = s.max_bias == 0.0f ? 1.0 : h < n_head_log2 ?
            pow(2.0, -(double) s.max_bias/n_head_log2*(h + 1)) : pow(2.0, -(double) s.max_bias/2/n_head_log2*(2*(h - n_head_log2) + 1));

        const auto at = [&](int64_t j, int64_t d) {
            return (s.per_head ? (i_seq*s.n_head_kv + h_kv)*s.n_kv + j : (i_seq*s.n_kv + j)*s.n_head_kv + h_kv)*d;
        };

        const float * q = in.q.data() + ((i_seq*n_head + h)*s.n_q + t)*s.dk;

        double max = s.sinks ? in.sinks[h] : -INFINITY;
        for (int64_t j = 0; j < s.n_kv; ++j) {
            double x = 0.0;
            for (int64_t i = 0; i < s.dk; ++i) {
                x += (double) q[i]*k[at(j, s.dk) + i];
            }
            x *= 1.0f/sqrtf((float) s.dk);
            if (s.softcap != 0.0f) {
                x = s.softcap*tanh(x/s.softcap);
            }
            if (s.mask != MASK_NONE) {
                const int64_t i_row = s.mask == MASK_HEADS ? (i_seq*n_head + h)*s.n_q + t : i_seq*s.n_q + t;
                x += slope*ggml_fp16_to_fp32(in.mask[i_row*s.n_kv + j]);
            }
            p[j] = x;
            max = std::max(max, x);
        }
        if (max == -INFINITY) {
            continue;
        }

        double sum = s.sinks ? exp(in.sinks[h] - max) : 0.0;
        for (auto & x : p) {
            x = exp(x - max);
            sum += x;
        }
        for (int64_t j = 0; j < s.n_kv; ++j) {
            p[j] /= sum;
            for (int64_t i = 0; i < s.dv; ++i) {
                res.out[((i_seq*s.n_q + t)*n_head + h)*s.dv + i] += p[j]*v[at(j, s.dv) + i];
            }
            const int64_t span = s.span > 0 ? s.span : s.n_q;
            if (t % span >= first) {
                const double w = p[j]*pow((double) decay, (double) (span - 1 - t % span));
                res.weights[(i_seq*s.n_head_kv + h_kv)*s.n_kv + j] += w;
                res.total[i_seq*s.n_head_kv + h_kv] += w;
            }
        }
    }
    return res;
}

static double error(const std::vector<float> & x, const std::vector<double> & y) {
    double err = 0.0;
    double max = 0.0;
    for (size_t i = 0; i < x.size(); ++i) {
        if (std::isnan(x[i])) {
            return INFINITY;
        }
        err = std::max(err, fabs(x[i] - y[i]));
        max = std::max(max, fabs(y[i]));
    }
    return max > 0.0 ? err/max : err;
}

static bool same(const std::vector<float> & x, const std::vector<float> & y) {
    return memcmp(x.data(), y.data(), x.size()*sizeof(float)) == 0;
}

// largest errors per type of K and V
struct worst { double ours = 0.0, upstream = 0.0, scores = 0.0, ratio = 0.0; };
static std::map<std::string, worst> errors;

static void check(const shape & s) {
    const auto name = s.name();
    const char * id = name.c_str();

    const int   n_own = s.span > 0 ? s.span : (int) s.n_q;
    const int   first = n_case % 3 == 0 ? 0 : n_case % 3 == 1 ? n_own - 1 : n_own/2;
    const float decay = n_case % 4 == 3 ? 0.95f : 1.0f;
    const int   n_thr = 1 + n_case % 3;

    n_case++;

    const auto in   = make_input(s, (uint32_t) n_case);
    const auto want = reference(s, in, first, decay);
    const auto up   = compute(s, in, false, 1);
    const auto res  = compute(s, in, true,  n_thr, first, decay);

    const double err_up = error(up .out, want.out);
    const double err    = error(res.out, want.out);

    // where upstream is exact to the last bits too, the two may differ in them
    CHECK(err <= std::max(err_up, 1e-6), "%s: %g, upstream %g", id, err, err_up);

    // scores: all of them, nothing behind them, and their sum
    double err_s = 0.0;
    for (int64_t i = 0; i < s.n_seq*s.n_head_kv; ++i) {
        double sum = 0.0;
        const float * x = res.scores.data() + i*(s.n_kv + scores_pad);
        for (int64_t j = 0; j < s.n_kv; ++j) {
            const double d = fabs(x[j] - want.weights[i*s.n_kv + j]);
            err_s = std::isnan(d) ? INFINITY : std::max(err_s, d);
            sum += x[j];
        }
        CHECK(fabs(sum - want.total[i]) <= 1e-5*std::max(1.0, want.total[i]), "%s: sum of scores %g, not %g", id, sum, want.total[i]);
        for (int64_t j = 0; j < scores_pad; ++j) {
            CHECK(memcmp(x + s.n_kv + j, &poison, sizeof(float)) == 0, "%s: written behind the keys", id);
        }
    }
    CHECK(err_s <= 1e-5*std::max(1.0, s.n_q*s.group/512.0), "%s: scores differ by %g", id, err_s); // a sum of so many f32 weights

    // without scores, and in any number of threads: the same bits
    for (int n : { 1, 2, 3, 4, 5, 8 }) {
        if ((n_case + n) % 4 == 0 || n_case <= 8) {
            const auto other = compute(s, in, true, n, first, decay);
            CHECK(same(res.out, other.out),       "%s: %d threads are not as %d", id, n, n_thr);
            CHECK(same(res.scores, other.scores), "%s: scores of %d threads are not as %d", id, n, n_thr);
        }
    }
    CHECK(same(res.out, compute(s, in, true, 2).out), "%s: another result without scores", id);

    auto & w = errors[std::string(ggml_type_name(s.k_type)) + "/" + ggml_type_name(s.v_type)];
    w.ours     = std::max(w.ours,     err);
    w.upstream = std::max(w.upstream, err_up);
    w.scores   = std::max(w.scores,   err_s);
    w.ratio    = std::max(w.ratio,    err/std::max(err_up, 1e-7));
}

// slots in another order: the same result but for the last bits
// a query of several sequences in one cache reads the pages of its own one alone: others may hold anything
static void check_pages(const shape & s) {
    const input  in   = make_input(s, 5);
    const output want = compute(s, in, true, 1);

    for (int64_t t = 0; t < s.n_q; ++t) {
        input other = in;
        for (std::vector<uint8_t> * rows : { &other.k, &other.v }) {
            auto * x = (ggml_fp16_t *) rows->data();

            const int64_t n_embd = s.n_head_kv*(rows == &other.k ? s.dk : s.dv);
            for (int64_t j = 0; j < s.n_kv; ++j) {
                if ((j/64*7 + 3) % s.n_q != t) {
                    std::fill(x + j*n_embd, x + (j + 1)*n_embd, ggml_fp32_to_fp16(poison));
                }
            }
        }
        const output got = compute(s, other, true, 2);

        const int64_t n = s.n_head()*s.dv;
        CHECK(memcmp(got.out.data() + t*n, want.out.data() + t*n, n*sizeof(float)) == 0, "%s: query %d reads rows of others", s.name().c_str(), (int) t);
    }
}

// a gate that is shut: zeros, and scores that nobody has touched; one that is open changes no bit
static void check_gate(const shape & s) {
    const input  in   = make_input(s, 6);
    const output want = compute(s, in, true, 2, 0);

    float open = 1.0f;
    float shut = 0.0f;

    const output a = compute(s, in, true, 2, 0, 1.0f, &open);
    CHECK(same(a.out, want.out) && same(a.scores, want.scores), "%s: an open gate", s.name().c_str());

    const output b = compute(s, in, true, 2, 0, 1.0f, &shut);
    CHECK(std::all_of(b.out.begin(), b.out.end(), [](float x) { return x == 0.0f; }), "%s: something behind a shut gate", s.name().c_str());
    CHECK(std::all_of(b.scores.begin(), b.scores.end(), [](float x) { return x != x; }), "%s: scores behind a shut gate", s.name().c_str());
}

static void check_permutation(const shape & s) {
    const auto in = make_input(s, 7);
    auto moved = in;

    std::vector<int64_t> to(s.n_kv);
    for (int64_t j = 0; j < s.n_kv; ++j) {
        to[j] = j;
    }
    std::mt19937 rng(8);
    std::shuffle(to.begin(), to.end(), rng);

    const size_t k_row = ggml_row_size(s.k_type, s.dk)*s.n_head_kv;
    const size_t v_row = ggml_row_size(s.v_type, s.dv)*s.n_head_kv;
    for (int64_t j = 0; j < s.n_kv; ++j) {
        memcpy(moved.k.data() + to[j]*k_row, in.k.data() + j*k_row, k_row);
        memcpy(moved.v.data() + to[j]*v_row, in.v.data() + j*v_row, v_row);
        for (int64_t t = 0; t < s.n_q && s.mask != MASK_NONE; ++t) {
            moved.mask[t*s.n_kv + to[j]] = in.mask[t*s.n_kv + j];
        }
    }

    const auto a = compute(s, in,    true, 2, 0);
    const auto b = compute(s, moved, true, 2, 0);

    const double err = error(b.out, std::vector<double>(a.out.begin(), a.out.end()));
    CHECK(err < 1e-6, "%s: another order of slots: %g", s.name().c_str(), err);

    double err_s = 0.0;
    for (int64_t h = 0; h < s.n_head_kv; ++h) {
        for (int64_t j = 0; j < s.n_kv; ++j) {
            err_s = std::max(err_s, (double) fabsf(a.scores[h*(s.n_kv + scores_pad) + j] - b.scores[h*(s.n_kv + scores_pad) + to[j]]));
        }
    }
    CHECK(err_s < 1e-6, "%s: another order of slots: scores %g", s.name().c_str(), err_s);
    printf("permutation: %s: %.1e, scores %.1e\n", s.name().c_str(), err, err_s);
}

// shapes that are not ours are upstream's, bit for bit, with the wish or without
static void check_other(const shape & s) {
    const auto in = make_input(s, 9);
    CHECK(same(compute(s, in, true, 1).out, compute(s, in, false, 1).out), "%s: not upstream's result", s.name().c_str());
}

int main(int argc, char ** argv) {
    const bool quick = argc > 1 && !strcmp(argv[1], "quick");

    ggml_backend_load_all();

    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!dev) {
        fprintf(stderr, "no CPU backend\n");
        return 1;
    }
    backend = ggml_backend_dev_init(dev, nullptr);
    set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads");

    const ggml_type types[] = { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_BF16, GGML_TYPE_F32, GGML_TYPE_Q4_0 };
    const int64_t   dims [] = { 64, 128, 96, 32, 256 };
    const int64_t   n_kvs[] = { 1, 7, 64, 256, 1000, 4096 };

    std::mt19937 rng(1);
    const auto pick = [&](int64_t a, int64_t b) { return a + (int64_t) (rng() % (uint32_t) (b - a + 1)); };

    // each pair of type, dimension and length; the rest is drawn
    const int n_round = quick ? 1 : 3;
    for (int round = 0; round < n_round; ++round) {
        for (ggml_type type : types) {
            for (int64_t d : dims) {
                for (int64_t n_kv : n_kvs) {
                    shape s;
                    s.k_type    = type;
                    s.v_type    = rng() % 5 == 0 ? types[rng() % 5] : type;
                    s.dk        = d;
                    s.dv        = rng() % 8 == 0 ? dims[rng() % 5] : d;
                    s.n_kv      = n_kv;
                    s.n_q       = rng() % 2 ? 1 : pick(2, 8);
                    s.group     = pick(1, 8);
                    s.n_head_kv = pick(1, n_kv == 4096 ? 2 : 5);
                    s.n_seq     = rng() % 3 ? 1 : pick(2, 3);
                    s.mask      = (mask_kind) (rng() % MASK_KINDS);
                    s.max_bias  = s.mask != MASK_NONE && s.mask != MASK_OWNERS && rng() % 4 == 0 ? 8.0f : 0.0f;
                    s.softcap   = rng() % 4 == 0 ? 10.0f : 0.0f;
                    s.sinks     = rng() % 4 == 0;
                    s.per_head  = rng() % 4 == 0;
                    if (n_kv == 4096 && s.n_q > 1) {
                        s.group = 1 + s.group/4;
                        s.n_seq = 1;
                    }
                    check(s);
                }
            }
        }
    }

    // one thing at a time, where others would hide it
    for (int mask = 0; mask < MASK_KINDS; ++mask) {
        for (int n_q : { 1, 3, 8 }) {
            shape s;
            s.mask  = (mask_kind) mask;
            s.n_q   = n_q;
            s.n_kv  = 600;
            s.group = 3;
            check(s);
            s.sinks = true;
            check(s);
        }
    }
    // the last one has more rows than a unit's scratch holds numbers
    for (int64_t group : { 16, 40, 71, 640 }) {
        shape s;
        s.group     = group;
        s.n_head_kv = 1;
        s.n_q       = group >= 71 ? 8 : 2;
        s.mask      = MASK_CAUSAL;
        check(s);
    }

    // a token of each of many sequences, which share one cache by pages
    for (int64_t n_q : { 2, 9, 12, 16 }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            shape s;
            s.k_type = s.v_type = type;
            s.n_q    = n_q;
            s.n_kv   = 64*n_q*2 + 23;
            s.group  = n_q == 12 ? 8 : 3;
            s.mask   = MASK_OWNERS;
            check(s);
            if (type == GGML_TYPE_F16) {
                check_pages(s);
            }
            s.sinks = true;
            check(s);
            for (int i = 0; i < 4 && n_q % 2 == 0; ++i) {
                s.span = (int) n_q/2;
                check(s);
            }
        }
    }

    for (int64_t n_kv : { 64, 1000, 4096 }) {
        for (mask_kind mask : { MASK_NONE, MASK_HOLES }) {
            shape s;
            s.n_kv  = n_kv;
            s.group = 4;
            s.mask  = mask;
            check_permutation(s);
        }
    }

    for (ggml_type type : types) {
        shape s;
        s.k_type = s.v_type = type;
        s.n_kv   = 1000;
        s.group  = 3;
        check_gate(s);
    }

    {
        shape s;
        s.n_q = 9;
        check_other(s);
        s.n_q = 17;
        s.mask = MASK_OWNERS;
        check_other(s);
        s.mask = MASK_NONE;
        s.n_q = 1;
        s.dk = s.dv = 80;
        check_other(s);
        s.dk = s.dv = 64;
        s.k_type = s.v_type = GGML_TYPE_Q5_0;
        check_other(s);
    }

    printf("%-10s %10s %10s %10s %10s\n", "k/v", "error", "upstream", "ratio", "scores");
    for (const auto & it : errors) {
        printf("%-10s %10.2e %10.2e %10.2f %10.2e\n", it.first.c_str(), it.second.ours, it.second.upstream, it.second.ratio, it.second.scores);
    }
    printf("%d shapes, %d failures\n", n_case, n_fail);

    ggml_backend_free(backend);
    return n_fail ? 1 : 0;
}
