// the nodes of ggml-kv-score.h against sums and choices in double precision
//
//   test-score-node [DEVICE]    on that device of ggml's, where it has kernels for them; without a name the code that the CPU runs

#include "llama-kv-score-node.h"
#include "test-check.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

static std::mt19937 rng(1);

static float draw(float scale) { return scale*std::normal_distribution<float>()(rng); }

static const float INF = std::numeric_limits<float>::infinity();

struct shape {
    ggml_type type    = GGML_TYPE_F16;
    int64_t n_embd    = 64;
    int64_t n_head_kv = 3;
    int64_t group     = 3;
    int64_t n_kv      = 256;
    int64_t n_rows    = 320;
    int64_t n_layer   = 8;
    int64_t n_stream  = 1;
    int64_t s0        = 0;     // the first stream of more
    float   soft_cap  = 0.0f;
    bool    sinks     = false;
    bool    mask_f32  = false;
    bool    holes     = false; // what the mask hides, whole parts of the keys among it
    float   peak      = 1.0f;  // of queries

    std::string name() const {
        char buf[256];
        snprintf(buf, sizeof(buf), "%s, %d values, heads %dx%d, %d of %d keys, %d layers, streams %d from %d, cap %g, sinks %d, mask f%d%s, peak %g",
                ggml_type_name(type), (int) n_embd, (int) n_head_kv, (int) group, (int) n_kv, (int) n_rows, (int) n_layer, (int) n_stream, (int) s0, soft_cap, sinks,
                mask_f32 ? 32 : 16, holes ? " with holes" : "", peak);
        return buf;
    }
};

// tensors with values, and one graph
struct world {
    ggml_backend_t backend;
    ggml_context_ptr ctx { ggml_init({ 256*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
    ggml_backend_buffer_ptr buf;
    ggml_cgraph * gf = ggml_new_graph(ctx.get());

    ggml_tensor * make(ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1) {
        return ggml_new_tensor_4d(ctx.get(), type, ne0, ne1, ne2, ne3);
    }
    void alloc() { buf.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend)); }

    bool run(ggml_tensor * node) {
        ggml_build_forward_expand(gf, node);
        return ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS;
    }
};

// what is written, and as which numbers a tensor of this type holds it
static std::vector<float> fill(ggml_tensor * t, float scale) {
    std::vector<float> x(ggml_nelements(t));
    for (float & v : x) {
        v = draw(scale);
    }

    std::vector<uint8_t> data(ggml_nbytes(t));
    ggml_quantize_chunk(t->type, x.data(), data.data(), 0, ggml_nelements(t)/t->ne[0], t->ne[0], nullptr);
    ggml_backend_tensor_set(t, data.data(), 0, data.size());

    if (t->type == GGML_TYPE_F32) {
        return x;
    }
    ggml_get_type_traits(t->type)->to_float(data.data(), x.data(), ggml_nelements(t));
    return x;
}

static void test_weights(ggml_backend_t backend, ggml_backend_buffer_type_t buft, const shape & sh) {
    world w { backend };

    const int64_t n_streams = sh.s0 + sh.n_stream + 1;
    const int64_t n_head    = sh.n_head_kv*sh.group;

    std::vector<ggml_tensor *> keys;
    llama_kv_score_weights what = {};
    for (int64_t l = 0; l < sh.n_layer; ++l) {
        keys.push_back(w.make(sh.type, sh.n_embd*sh.n_head_kv, sh.n_rows, n_streams));
        what.q.push_back(w.make(GGML_TYPE_F32, sh.n_embd, n_head, 1, sh.n_stream));
        if (sh.sinks) {
            what.sinks.push_back(w.make(GGML_TYPE_F32, n_head));
        }
    }
    ggml_tensor * mask = w.make(sh.mask_f32 ? GGML_TYPE_F32 : GGML_TYPE_F16, sh.n_kv, 32, 1, sh.n_stream); // rows as upstream pads them
    ggml_tensor * sums = w.make(GGML_TYPE_F32, sh.n_rows, sh.n_head_kv*sh.n_layer, n_streams);
    w.alloc();

    std::vector<std::vector<float>> k, q, sink;
    for (int64_t l = 0; l < sh.n_layer; ++l) {
        k.push_back(fill(keys[l], 1.0f));
        q.push_back(fill(what.q[l], sh.peak));
        if (sh.sinks) {
            sink.push_back(fill(what.sinks[l], 2.0f));
        }
        what.q[l] = ggml_permute(w.ctx.get(), what.q[l], 0, 2, 1, 3); // as attention has it
    }

    std::vector<float> bias(sh.n_kv*32*sh.n_stream);
    for (int64_t i = 0; i < (int64_t) bias.size(); ++i) {
        const int64_t j = i % sh.n_kv;
        bias[i] = sh.holes && (j < 150 || j % 3 == 0) ? -INF : 0.0f;
    }
    if (sh.mask_f32) {
        ggml_backend_tensor_set(mask, bias.data(), 0, ggml_nbytes(mask));
    } else {
        std::vector<ggml_fp16_t> half(bias.size());
        ggml_fp32_to_fp16_row(bias.data(), half.data(), half.size());
        ggml_backend_tensor_set(mask, half.data(), 0, ggml_nbytes(mask));
    }
    const std::vector<float> before = fill(sums, 1.0f);

    const float scale = 1.0f/std::sqrt((float) sh.n_embd);

    what.keys     = keys.data();
    what.mask     = mask;
    what.sums     = ggml_view_3d(w.ctx.get(), sums, sh.n_kv, sums->ne[1], sh.n_stream, sums->nb[1], sums->nb[2], sh.s0*sums->nb[2]);
    what.scale    = scale;
    what.soft_cap = sh.soft_cap;
    what.stream   = (int32_t) sh.s0;

    ggml_tensor * node = llama_kv_score_weights_node(w.ctx.get(), what);
    CHECK(llama_kv_score_covers(buft, node), "%s", sh.name().c_str());
    CHECK(w.run(node), "%s", sh.name().c_str());

    std::vector<float> after(before.size());
    ggml_backend_tensor_get(sums, after.data(), 0, ggml_nbytes(sums));

    std::vector<double> want(before.begin(), before.end());
    for (int64_t s = 0; s < sh.n_stream; ++s) {
        for (int64_t l = 0; l < sh.n_layer; ++l) {
            for (int64_t h = 0; h < n_head; ++h) {
                std::vector<double> x(sh.n_kv);
                for (int64_t j = 0; j < sh.n_kv; ++j) {
                    for (int64_t c = 0; c < sh.n_embd; ++c) {
                        x[j] += (double) q[l][(s*n_head + h)*sh.n_embd + c]*k[l][(((sh.s0 + s)*sh.n_rows + j)*sh.n_head_kv + h/sh.group)*sh.n_embd + c];
                    }
                    x[j] = sh.soft_cap > 0.0f ? sh.soft_cap*std::tanh(x[j]*scale/sh.soft_cap) : x[j]*scale;
                    x[j] += bias[j];
                }
                double most = sh.sinks ? sink[l][h] : -INF;
                for (double v : x) {
                    most = std::max(most, v);
                }
                double sum = sh.sinks ? std::exp(sink[l][h] - most) : 0.0;
                for (double v : x) {
                    sum += std::exp(v - most);
                }
                for (int64_t j = 0; j < sh.n_kv; ++j) {
                    want[((sh.s0 + s)*sums->ne[1] + l*sh.n_head_kv + h/sh.group)*sh.n_rows + j] += std::exp(x[j] - most)/sum;
                }
            }
        }
    }

    // what no token has is as before, to the bit
    double most = 0.0;
    for (int64_t i = 0; i < (int64_t) want.size(); ++i) {
        const int64_t s = i/sh.n_rows/sums->ne[1];
        if (i % sh.n_rows >= sh.n_kv || s < sh.s0 || s >= sh.s0 + sh.n_stream) {
            CHECK(after[i] == before[i], "%s: element %d", sh.name().c_str(), (int) i);
        } else {
            most = std::max(most, std::isfinite(after[i]) ? std::fabs(after[i] - want[i]) : INF);
        }
    }
    CHECK(most <= 1e-5, "%s: off by %g", sh.name().c_str(), most);
}

// births and worths at random, most of them equal to others; n_per heads decide together; is_product: of two kinds; negative: the largest goes first
static void test_choice(ggml_backend_t backend, ggml_backend_buffer_type_t buft, int64_t n_unit, int64_t n_per, int64_t n_rows, int64_t n_streams, int64_t s0, int64_t n_stream,
        bool is_odd, bool is_product, bool negative) {
    world w { backend };

    const int64_t i_birth = is_product ? 2 : 1;
    const int64_t n_kind  = i_birth + 1;
    const int64_t n_head  = n_unit*n_per;
    const int32_t clock   = 64;
    const int64_t n_lines = 16;

    ggml_tensor * planes  = w.make(GGML_TYPE_F32, n_rows, n_head, n_kind*n_streams);
    ggml_tensor * now     = w.make(GGML_TYPE_F32, clock + n_streams);
    ggml_tensor * victims = w.make(GGML_TYPE_I32, n_unit, n_streams);
    ggml_tensor * history = w.make(GGML_TYPE_F32, n_unit, n_lines*n_streams);
    ggml_tensor * rows    = n_per > 1 ? w.make(GGML_TYPE_I64, n_unit, n_streams) : nullptr;
    w.alloc();

    std::vector<float> p(ggml_nelements(planes));
    std::vector<float> t(ggml_nelements(now));
    for (int64_t s = 0; s < n_streams; ++s) {
        // positions 0 to 2*n_rows at random, of which the first 4 are protected and the last 20 recent
        std::vector<int> pos(2*n_rows);
        for (size_t i = 0; i < pos.size(); ++i) {
            pos[i] = (int) i;
        }
        for (int64_t u = 0; u < n_unit; ++u) {
            std::shuffle(pos.begin(), pos.end(), rng);
            for (int64_t h = u*n_per; h < (u + 1)*n_per; ++h) {
                for (int64_t j = 0; j < n_rows; ++j) {
                    float worth = (float) (rng() % 5)/4.0f;
                    if (is_odd && rng() % 8 == 0) {
                        worth = rng() % 2 ? std::numeric_limits<float>::quiet_NaN() : INF;
                    }
                    p[(s*n_head + h)*n_rows + j] = worth;
                    if (is_product) {
                        p[((n_streams + s)*n_head + h)*n_rows + j] = 0.1f*(float) (1 + rng() % 3);
                    }
                    p[((i_birth*n_streams + s)*n_head + h)*n_rows + j] = pos[j] < 4 || j % 17 == 5 ? -GGML_KV_SCORE_FAR : -GGML_KV_SCORE_UNIT*(float) pos[j];
                }
            }
        }
        t[s]         = (float) (s*n_lines + rng() % n_lines);
        t[clock + s] = GGML_KV_SCORE_UNIT*(float) (2*n_rows - 21);
    }
    ggml_backend_buffer_clear(w.buf.get(), 0);
    ggml_backend_tensor_set(planes, p.data(), 0, ggml_nbytes(planes));
    ggml_backend_tensor_set(now,    t.data(), 0, ggml_nbytes(now));

    ggml_tensor * node = llama_kv_score_choice_node(w.ctx.get(), ggml_view_1d(w.ctx.get(), victims, n_unit*n_stream, s0*victims->nb[1]), { planes, now, history, rows, (int32_t) i_birth, negative },
            (int32_t) n_per, (int32_t) s0, (int32_t) n_streams, clock);
    CHECK(llama_kv_score_covers(buft, node), "choice");
    CHECK(w.run(node), "choice");

    std::vector<int32_t> got(ggml_nelements(victims));
    std::vector<float>   lines(ggml_nelements(history));
    ggml_backend_tensor_get(victims, got.data(), 0, ggml_nbytes(victims));
    ggml_backend_tensor_get(history, lines.data(), 0, ggml_nbytes(history));

    std::vector<int64_t> wide(got.begin(), got.end());
    if (rows) {
        ggml_backend_tensor_get(rows, wide.data(), 0, ggml_nbytes(rows));
    }

    for (int64_t s = 0; s < n_streams; ++s) {
        const int64_t line = (int64_t) t[s];

        for (int64_t u = 0; u < n_unit; ++u) {
            int64_t best = -1;
            double best_worth = INF;
            float  best_birth = 0.0f;
            for (int64_t j = 0; j < n_rows; ++j) {
                const float birth = p[((i_birth*n_streams + s)*n_head + u*n_per)*n_rows + j];
                if (birth == -GGML_KV_SCORE_FAR || birth < -t[clock + s]) {
                    continue; // protected, empty, recent
                }
                float worth = 0.0f;
                for (int64_t h = u*n_per; h < (u + 1)*n_per; ++h) {
                    volatile float part = p[(s*n_head + h)*n_rows + j]; // rounded before it is added
                    if (is_product) {
                        part = part*p[((n_streams + s)*n_head + h)*n_rows + j];
                    }
                    worth += part;
                }
                worth = negative ? -worth : worth;
                worth = std::isnan(worth) ? GGML_KV_SCORE_MOST : std::max(-GGML_KV_SCORE_MOST, std::min(worth, GGML_KV_SCORE_MOST));
                if (best < 0 || worth < best_worth || (worth == best_worth && birth > best_birth)) {
                    best       = j;
                    best_worth = worth;
                    best_birth = birth;
                }
            }
            const bool is_meant = s >= s0 && s < s0 + n_stream;

            CHECK(got[s*n_unit + u] == (is_meant ? best : 0), "unit %d of stream %d: %d, not %d", (int) u, (int) s, got[s*n_unit + u], (int) best);
            CHECK(wide[s*n_unit + u] == got[s*n_unit + u], "unit %d of stream %d", (int) u, (int) s);
            CHECK(lines[line*n_unit + u] == (float) (is_meant ? best : 0), "unit %d of stream %d", (int) u, (int) s);
        }
    }
}

int main(int argc, char ** argv) {
    ggml_backend_load_all();

    ggml_backend_dev_t dev = argc > 1 ? ggml_backend_dev_by_name(argv[1]) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_ptr backend { dev ? ggml_backend_dev_init(dev, nullptr) : nullptr };
    if (!backend) {
        fprintf(stderr, "no such device\n");
        return 2;
    }
    ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(dev);
    if (argc > 1 && !llama_kv_has_score_node(buft)) {
        fprintf(stderr, "%s has no kernels for these nodes\n", argv[1]);
        return 2;
    }

    std::vector<shape> shapes;
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_F32 }) {
        for (int64_t n_embd : { 64, 96, 128, 256 }) {
            for (int64_t group = 1; group <= 8; ++group) {
                shape s;
                s.type   = type;
                s.n_embd = n_embd;
                s.group  = group;
                // the others in turns
                const int64_t i = (int64_t) shapes.size();
                s.n_kv      = i % 4 == 0 ? 1000 : i % 4 == 1 ? 256 : i % 4 == 2 ? 33 : 512;
                s.n_rows    = s.n_kv + 40;
                s.n_head_kv = 1 + i % 3;
                s.sinks     = i % 3 == 1;
                s.n_layer   = s.sinks ? 1 + i % 4 : 1 + i % 8;
                s.soft_cap  = i % 5 == 2 ? 50.0f : i % 5 == 4 ? 2.0f : 0.0f;
                s.mask_f32  = i % 7 == 3;
                s.holes     = i % 2 == 1;
                s.n_stream  = i % 6 == 5 ? 3 : 1;
                s.s0        = i % 4 == 3 ? 2 : 0;
                s.peak      = i % 5 == 0 ? 8.0f : 1.0f;
                shapes.push_back(s);
            }
        }
    }
    for (const auto & s : shapes) {
        test_weights(backend.get(), buft, s);
    }

    for (int i = 0; i < 40; ++i) {
        test_choice(backend.get(), buft, 1 + i % 7, i % 3 == 0 ? 1 : 1 + i % 9, 40 + 61*i, 1 + i % 3, i % 3 == 2 ? 1 : 0, i % 3 == 2 ? 2 : 1, i % 5 == 0, i % 4 == 1, i % 8 > 4);
    }

    printf("%d shapes, %d failures\n%s", (int) shapes.size() + 40, n_fail, n_fail == 0 ? "OK\n" : "");
    return n_fail == 0 ? 0 : 1;
}
