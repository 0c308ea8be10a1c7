#include "llama-kv-rotate.h"

#include "ggml-backend.h"

bool llama_kv_rotate(llama_kv_rope & rope, llama_kv_backends & backends, const std::vector<llama_kv_layer> & layers, uint32_t strm,
        const std::vector<llama_kv_frame::turn> & turns) {
    if (turns.empty()) {
        return true;
    }

    const int64_t n = turns.size();

    // equal for all, as after a re-base: one position for all rows
    const bool uniform = turns.front().delta == turns.back().delta;

    std::vector<int32_t> slots32;
    std::vector<int64_t> slots64;
    std::vector<int32_t> deltas;
    for (const auto & t : turns) {
        slots32.push_back((int32_t) t.slot);
        slots64.push_back(t.slot);
        deltas .push_back(t.delta);
    }

    std::map<ggml_backend_t, std::vector<const llama_kv_layer *>> by_backend;
    for (const auto & layer : layers) {
        if (rope.has(layer.il)) {
            by_backend[backends.get(layer.k->buffer)].push_back(&layer);
        }
    }

    for (const auto & [backend, group] : by_backend) {
        const size_t n_nodes = 16*group.size() + 8;

        ggml_context_ptr ctx_ptr { ggml_init({ n_nodes*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false), nullptr, true }) };

        ggml_context * ctx = ctx_ptr.get();
        ggml_cgraph  * gf  = ggml_new_graph_custom(ctx, n_nodes, false);

        ggml_tensor * src = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
        ggml_tensor * dst = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n);
        ggml_tensor * pos = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, uniform ? 1 : n);
        ggml_set_input(src);
        ggml_set_input(dst);
        ggml_set_input(pos);

        for (const auto * layer : group) {
            ggml_tensor * k = layer->k_stream[strm];

            ggml_tensor * cur = ggml_get_rows(ctx, k, src); // f32 [n_embd_k_gqa, n]

            cur = rope.build(ctx, cur, pos, layer->il, ggml_backend_buffer_get_type(layer->k->buffer));

            ggml_build_forward_expand(gf, ggml_set_rows(ctx, k, cur, dst));
        }

        if (!backends.alloc(backend, gf)) {
            return false;
        }
        ggml_backend_tensor_set(src, slots32.data(), 0, ggml_nbytes(src));
        ggml_backend_tensor_set(dst, slots64.data(), 0, ggml_nbytes(dst));
        ggml_backend_tensor_set(pos, deltas .data(), 0, ggml_nbytes(pos));

        if (!backends.compute(backend, gf)) {
            return false;
        }
    }

    return true;
}
