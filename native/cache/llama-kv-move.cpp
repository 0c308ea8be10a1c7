#include "llama-kv-move.h"

#include "ggml-backend.h"

#include <cstring>

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
        rows->ne[0] = ggml_row_size(rows->type, rows->ne[0])/sizeof(ggml_fp16_t);
        rows->type  = GGML_TYPE_F16;
        rows->nb[0] = sizeof(ggml_fp16_t);
    }

    return rows;
}

ggml_tensor * llama_kv_rows(ggml_context * ctx, ggml_tensor * t, uint32_t slot, uint32_t n, bool transposed, uint32_t i_head, uint32_t n_head) {
    const int64_t n_embd = t->ne[0]/n_head;

    if (transposed) {
        const size_t ts = ggml_type_size(t->type);

        return ggml_view_2d(ctx, t, n, n_embd, t->ne[1]*ts, slot*ts + i_head*n_embd*t->ne[1]*ts);
    }

    return llama_kv_words(ggml_view_2d(ctx, t, n_embd, n, t->nb[1], slot*t->nb[1] + ggml_row_size(t->type, i_head*n_embd)));
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

void llama_kv_move_heads(const std::vector<llama_kv_layer> & layers, uint32_t strm, const llama_kv_moves_of & moves_of, bool v_trans) {
    std::vector<uint8_t> tmp;

    const auto move = [&](ggml_tensor * t, size_t i_layer, bool transposed) {
        const uint32_t n_head = layers[i_layer].n_head_kv;
        const bool     host   = ggml_backend_buffer_is_host(t->buffer);

        auto * data = (uint8_t *) t->data;
        if (!host) {
            tmp.resize(ggml_nbytes(t));
            data = tmp.data();
            ggml_backend_tensor_get(t, data, 0, tmp.size());
        }

        const size_t n_bytes = ggml_row_size(t->type, t->ne[0]/n_head);
        const size_t ts      = ggml_type_size(t->type);

        for (uint32_t h = 0; h < n_head; ++h) {
            const auto & moves = moves_of(i_layer, h);

            if (!transposed) {
                for (const auto & m : moves) {
                    memcpy(data + m.dst*t->nb[1] + h*n_bytes, data + m.src*t->nb[1] + h*n_bytes, n_bytes);
                }
                continue;
            }

            const int64_t n_embd = t->ne[0]/n_head;
            for (int64_t c = h*n_embd; c < (h + 1)*n_embd; ++c) {
                uint8_t * row = data + c*t->ne[1]*ts;

                for (const auto & m : moves) {
                    memcpy(row + m.dst*ts, row + m.src*ts, ts);
                }
            }
        }

        if (!host) {
            ggml_backend_tensor_set(t, data, 0, tmp.size());
        }
    };

    for (size_t i = 0; i < layers.size(); ++i) {
        move(layers[i].k_stream[strm], i, false);
        if (layers[i].v_stream[strm]) {
            move(layers[i].v_stream[strm], i, v_trans);
        }
    }
}
