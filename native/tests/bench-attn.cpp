// how fast the attention of one token reads the cache: our CPU kernel, upstream's, and a plain read of the same bytes, in turns
//
//   bench-attn [shape=NAME] [n_kv=N] [type=f16|q8_0] [threads=N] [r=N]     one JSON object per shape, size, type and number of threads

#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-cpu-attn.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

struct model {
    const char * name;
    int n_layer, n_head, n_head_kv, head_dim;
};

static const model models[] = {
    { "smollm-135m",  30,  9,  3, 64 },
    { "llama-3.2-1b", 16, 32,  8, 64 },
    { "smollm2-1.7b", 24, 32, 32, 64 },
    { "qwen2.5-0.5b", 24, 14,  2, 64 },
};

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size()/2];
}

// every byte once, in as many streams as there are threads
static uint64_t read_all(const std::vector<ggml_tensor *> & tensors, int n_threads) {
    std::vector<uint64_t>    sums(n_threads*8, 0);
    std::vector<std::thread> threads;

    const auto part = [&](int i) {
        uint64_t s[8] = { 0 };
        for (const auto * t : tensors) {
            const size_t     n     = ggml_nbytes(t)/64;
            const uint64_t * data  = (const uint64_t *) t->data;
            const size_t     begin = n*i/n_threads;
            const size_t     end   = n*(i + 1)/n_threads;
            for (size_t j = begin*8; j < end*8; j += 8) {
                for (int k = 0; k < 8; ++k) {
                    s[k] += data[j + k];
                }
            }
        }
        for (int k = 0; k < 8; ++k) {
            sums[i*8 + k] = s[k];
        }
    };
    for (int i = 1; i < n_threads; ++i) {
        threads.emplace_back(part, i);
    }
    part(0);
    for (auto & t : threads) {
        t.join();
    }

    uint64_t res = 0;
    for (const uint64_t s : sums) {
        res += s;
    }
    return res;
}

// the attention of one token in every layer
struct graph {
    ggml_context * ctx;
    ggml_cgraph  * gf;
    ggml_backend_buffer_t buf;

    graph(ggml_backend_t backend, const model & m, const std::vector<ggml_tensor *> & k, const std::vector<ggml_tensor *> & v, bool ours, bool scores) {
        ctx = ggml_init({ 64*1024*1024/16, nullptr, true });
        gf  = ggml_new_graph(ctx);

        const int64_t n_kv = k[0]->ne[1];

        ggml_tensor * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, m.head_dim, 1, m.n_head);
        ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, 1);
        ggml_tensor * sums = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_kv, m.n_head_kv, 1);

        for (int il = 0; il < m.n_layer; ++il) {
            const auto heads = [&](ggml_tensor * t) {
                return ggml_view_3d(ctx, t, m.head_dim, n_kv, m.n_head_kv, t->nb[1], ggml_row_size(t->type, m.head_dim), 0);
            };
            ggml_tensor * cur = ggml_flash_attn_ext(ctx, q, heads(k[il]), heads(v[il]), mask, 0.125f, 0.0f, 0.0f);
            ggml_prec_set_acc(cur, GGML_PREC_F32);
            if (scores) {
                ggml_cpu_attn_set_scores(cur, sums, 0, 1.0f);
            } else if (ours) {
                ggml_cpu_attn_enable(cur, GGML_CPU_ATTN_ON);
            }
            ggml_build_forward_expand(gf, cur);
        }
        buf = ggml_backend_alloc_ctx_tensors(ctx, backend);

        std::vector<float> x(ggml_nelements(q));
        for (size_t i = 0; i < x.size(); ++i) {
            x[i] = (float) (rand() % 1000)/500 - 1;
        }
        ggml_backend_tensor_set(q, x.data(), 0, ggml_nbytes(q));
        ggml_backend_tensor_memset(mask, 0, 0, ggml_nbytes(mask));
    }

    ~graph() {
        ggml_backend_buffer_free(buf);
        ggml_free(ctx);
    }
};

static void run(const model & m, int64_t n_kv, ggml_type type, int n_threads, int n_rep) {
    ggml_backend_t backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    const auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    set_n_threads(backend, n_threads);

    ggml_context * ctx = ggml_init({ 1024*1024, nullptr, true });

    std::vector<ggml_tensor *> k, v, all;
    for (int il = 0; il < m.n_layer; ++il) {
        k.push_back(ggml_new_tensor_2d(ctx, type, m.head_dim*m.n_head_kv, n_kv));
        v.push_back(ggml_new_tensor_2d(ctx, type, m.head_dim*m.n_head_kv, n_kv));
        all.push_back(k.back());
        all.push_back(v.back());
    }
    ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors(ctx, backend);

    // a few random rows, over and over
    const int64_t n_rows = 64;

    std::vector<float>   x(k[0]->ne[0]*n_rows);
    std::vector<uint8_t> rows(k[0]->nb[1]*n_rows);
    for (auto & y : x) {
        y = (float) (rand() % 1000)/500 - 1;
    }
    ggml_quantize_chunk(type, x.data(), rows.data(), 0, n_rows, k[0]->ne[0], nullptr);
    for (auto * t : all) {
        for (int64_t i = 0; i < n_kv; i += n_rows) {
            ggml_backend_tensor_set(t, rows.data(), i*t->nb[1], std::min(n_rows, n_kv - i)*t->nb[1]);
        }
    }

    double bytes = 0;
    for (const auto * t : all) {
        bytes += ggml_nbytes(t);
    }

    graph upstream(backend, m, k, v, false, false);
    graph ours    (backend, m, k, v, true,  false);
    graph scores  (backend, m, k, v, true,  true);

    uint64_t sink = 0;
    std::vector<double> t_read, t_up, t_ours, t_scores;

    const auto timed = [&](std::vector<double> & to, auto && body) {
        // threads of the sample before may spin for a while
        std::this_thread::sleep_for(std::chrono::milliseconds(30));

        const double begin = now();
        body();
        to.push_back(now() - begin);
    };
    for (int r = 0; r < n_rep + 1; ++r) {
        timed(t_read,   [&] { sink += read_all(all, n_threads); });
        timed(t_up,     [&] { ggml_backend_graph_compute(backend, upstream.gf); });
        timed(t_ours,   [&] { ggml_backend_graph_compute(backend, ours.gf); });
        timed(t_scores, [&] { ggml_backend_graph_compute(backend, scores.gf); });
        if (r == 0) {
            t_read.clear(), t_up.clear(), t_ours.clear(), t_scores.clear();
        }
    }

    const double gb = bytes/1e9;
    printf("{\"shape\": \"%s\", \"n_kv\": %d, \"type\": \"%s\", \"threads\": %d, \"mb\": %.1f, \"read_gbs\": %.2f, \"upstream_gbs\": %.2f, \"ours_gbs\": %.2f, "
           "\"scores_gbs\": %.2f, \"scores_of_read\": %.3f, \"upstream_ms\": %.3f, \"ours_ms\": %.3f, \"scores_ms\": %.3f, \"r\": %d, \"check\": %d}\n",
            m.name, (int) n_kv, ggml_type_name(type), n_threads, bytes/1e6, gb/median(t_read), gb/median(t_up), gb/median(t_ours), gb/median(t_scores),
            median(t_read)/median(t_scores), 1e3*median(t_up), 1e3*median(t_ours), 1e3*median(t_scores), n_rep, (int) (sink % 7));
    fflush(stdout);

    ggml_backend_buffer_free(buf);
    ggml_free(ctx);
    ggml_backend_free(backend);
}

int main(int argc, char ** argv) {
    std::string shape;
    std::vector<int64_t> sizes = { 256, 1024, 4096, 16384 };
    std::vector<int>     threads = { 1, 2 };
    std::vector<ggml_type> types = { GGML_TYPE_F16, GGML_TYPE_Q8_0 };
    int n_rep = 11;

    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        const std::string value = arg.substr(std::min(arg.size(), arg.find('=') + 1));
        if (arg.rfind("shape=", 0) == 0) {
            shape = value;
        } else if (arg.rfind("n_kv=", 0) == 0) {
            sizes = { atoll(value.c_str()) };
        } else if (arg.rfind("threads=", 0) == 0) {
            threads = { atoi(value.c_str()) };
        } else if (arg.rfind("type=", 0) == 0) {
            types = { value == "q8_0" ? GGML_TYPE_Q8_0 : GGML_TYPE_F16 };
        } else if (arg.rfind("r=", 0) == 0) {
            n_rep = atoi(value.c_str());
        } else {
            fprintf(stderr, "usage: bench-attn [shape=NAME] [n_kv=N] [type=f16|q8_0] [threads=N] [r=N]\n");
            return 2;
        }
    }

    ggml_backend_load_all();

    for (const auto & m : models) {
        if (!shape.empty() && shape != m.name) {
            continue;
        }
        for (const int64_t n_kv : sizes) {
            for (const ggml_type type : types) {
                for (const int n : threads) {
                    run(m, n_kv, type, n, n_rep);
                }
            }
        }
    }
    return 0;
}
