#include "llama-kv-rotate.h"

#include "ggml-backend.h"

bool llama_kv_rotate(llama_kv_rope & rope, llama_kv_backends & backends, const std::vector<llama_kv_layer> & layers, uint32_t strm,
        const std::vector<llama_kv_frame::rotation> & rotations) {
    if (rotations.empty()) {
        return true;
    }

    // equal for all, as after a re-base: one position for all rows
    const bool uniform = rotations.front().delta == rotations.back().delta;

    std::vector<int32_t> slots32;
    std::vector<int64_t> slots64;
    std::vector<int32_t> deltas;
    for (const auto & t : rotations) {
        slots32.push_back((int32_t) t.slot);
        slots64.push_back(t.slot);
        deltas .push_back(t.delta);
    }
    if (uniform) {
        deltas.resize(1);
    }

    std::map<ggml_backend_t, std::vector<const llama_kv_layer *>> by_backend;
    for (const auto & layer : layers) {
        if (rope.has(layer.il)) {
            by_backend[backends.get(layer.k->buffer)].push_back(&layer);
        }
    }

    for (const auto & [backend, group] : by_backend) {
        llama_kv_graph graph(16*group.size() + 8);

        ggml_context * ctx = graph.get_ctx();

        ggml_tensor * src = graph.input(slots32);
        ggml_tensor * dst = graph.input(slots64);
        ggml_tensor * pos = graph.input(deltas);

        for (const auto * layer : group) {
            ggml_tensor * k = layer->k_stream[strm];

            ggml_tensor * cur = ggml_get_rows(ctx, k, src); // f32 [n_embd_k_gqa, n]

            cur = rope.build(ctx, cur, pos, layer->il, ggml_backend_buffer_get_type(layer->k->buffer));

            graph.expand(ggml_set_rows(ctx, k, cur, dst));
        }

        if (!graph.compute(backends, backend)) {
            return false;
        }
    }

    return true;
}

bool llama_kv_rotate_heads(llama_kv_rope & rope, llama_kv_backends & backends, const std::vector<llama_kv_layer> & layers, uint32_t strm,
        const std::vector<std::vector<llama_kv_rotation>> & rotations) {
    std::map<ggml_backend_t, std::vector<size_t>> by_backend;
    for (size_t i = 0; i < layers.size(); ++i) {
        if (rope.has(layers[i].il) && !rotations[i].empty()) {
            by_backend[backends.get(layers[i].k->buffer)].push_back(i);
        }
    }

    for (const auto & [backend, idx] : by_backend) {
        llama_kv_graph graph(24*idx.size() + 8);

        ggml_context * ctx = graph.get_ctx();

        for (const size_t i : idx) {
            std::vector<int32_t> slots32;
            std::vector<int64_t> slots64;
            std::vector<int32_t> deltas;
            for (const auto & t : rotations[i]) {
                slots32.push_back((int32_t) t.slot);
                slots64.push_back(t.slot);
                deltas .push_back(t.delta);
            }

            ggml_tensor * src = graph.input(slots32);
            ggml_tensor * dst = graph.input(slots64);
            ggml_tensor * pos = graph.input(deltas);

            ggml_tensor * k = layers[i].k_stream[strm];

            const int64_t n_embd = k->ne[0]/layers[i].n_head_kv;

            k = ggml_view_2d(ctx, k, n_embd, k->ne[1]*layers[i].n_head_kv, ggml_row_size(k->type, n_embd), 0);

            ggml_tensor * cur = ggml_get_rows(ctx, k, src); // f32 [n_embd_head, n]

            cur = rope.build(ctx, cur, pos, layers[i].il, ggml_backend_buffer_get_type(layers[i].k->buffer));

            graph.expand(ggml_set_rows(ctx, k, cur, dst));
        }

        if (!graph.compute(backends, backend)) {
            return false;
        }
    }

    return true;
}
