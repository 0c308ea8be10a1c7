#include "llama-kv-move.h"

#include "ggml-backend.h"

std::vector<llama_kv_run> llama_kv_runs(const std::vector<llama_kv_ledger::move> & moves) {
    std::vector<llama_kv_run> res;

    for (const auto & m : moves) {
        if (!res.empty() && m.src == res.back().src + res.back().n && m.dst == res.back().dst + res.back().n) {
            res.back().n++;
        } else {
            res.push_back({ m.src, m.dst, 1 });
        }
    }

    return res;
}

ggml_tensor * llama_kv_words(ggml_tensor * rows) {
    if (ggml_is_quantized(rows->type)) {
        rows->type  = GGML_TYPE_F16;
        rows->ne[0] = rows->nb[1]/sizeof(ggml_fp16_t);
        rows->nb[0] = sizeof(ggml_fp16_t);
    }

    return rows;
}

ggml_tensor * llama_kv_rows(ggml_context * ctx, ggml_tensor * t, uint32_t slot, uint32_t n, bool transposed) {
    if (transposed) {
        const size_t ts = ggml_type_size(t->type);

        return ggml_view_2d(ctx, t, n, t->ne[0], t->ne[1]*ts, slot*ts);
    }

    return llama_kv_words(ggml_view_2d(ctx, t, t->ne[0], n, t->nb[1], slot*t->nb[1]));
}

bool llama_kv_move(llama_kv_backends & backends, const std::vector<llama_kv_layer> & layers, uint32_t strm,
        const std::vector<llama_kv_ledger::move> & moves, bool v_trans) {
    const auto runs = llama_kv_runs(moves);

    std::map<ggml_backend_t, std::vector<const llama_kv_layer *>> by_backend;
    for (const auto & layer : layers) {
        by_backend[backends.get(layer.k->buffer)].push_back(&layer);
    }

    for (const auto & [backend, group] : by_backend) {
        // a copy is three tensors (two views and the result), and each of K and V is visited once more
        const size_t n_nodes = 2*group.size()*(3*runs.size() + 1);

        llama_kv_graph graph(n_nodes);

        ggml_context * ctx = graph.get_ctx();

        for (const auto * layer : group) {
            ggml_tensor * k = layer->k_stream[strm];
            ggml_tensor * v = layer->v_stream[strm];

            for (const auto & r : runs) {
                graph.expand(ggml_cpy(ctx, llama_kv_rows(ctx, k, r.src, r.n), llama_kv_rows(ctx, k, r.dst, r.n)));

                if (v) {
                    graph.expand(ggml_cpy(ctx, llama_kv_rows(ctx, v, r.src, r.n, v_trans), llama_kv_rows(ctx, v, r.dst, r.n, v_trans)));
                }
            }
        }

        if (!graph.compute(backends, backend)) {
            return false;
        }
    }

    return true;
}
