#include "llama-kv-gather.h"

#include "llama-kv-move.h"

#include "ggml-backend.h"

#include <stdexcept>

llama_kv_gather::llama_kv_gather(llama_kv_rope * rope, llama_kv_backends & backends, const std::vector<llama_kv_layer> & layers,
        uint32_t n_stream, uint32_t n_ubatch, bool v_trans) :
    rope(rope), backends(backends), layers(layers), v_trans(v_trans), n_slots(layers.empty() ? 0 : (uint32_t) layers[0].k->ne[1]),
    copies(layers.size()), half(n_stream, 0) {
    if (!rope) {
        return;
    }

    std::map<ggml_backend_buffer_type_t, copy> shared;

    for (size_t i = 0; i < layers.size(); ++i) {
        if (!rope->has(layers[i].il)) {
            continue;
        }

        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(layers[i].k->buffer);

        auto & b = blocks[buft];
        auto & s = shared[buft];
        if (!b.ctx) {
            b.ctx.reset(ggml_init({ (layers.size() + 2)*ggml_tensor_overhead(), nullptr, true }));

            s.pos  = ggml_new_tensor_1d(b.ctx.get(), GGML_TYPE_I32, n_ubatch);
            s.idxs = ggml_new_tensor_1d(b.ctx.get(), GGML_TYPE_I64, n_ubatch);
        }

        copies[i]   = s;
        copies[i].k = ggml_new_tensor_2d(b.ctx.get(), ggml_is_quantized(layers[i].k->type) ? GGML_TYPE_F16 : layers[i].k->type,
                layers[i].k->ne[0], 2ll*n_slots*n_stream);
    }

    for (auto & [buft, b] : blocks) {
        b.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(b.ctx.get(), buft));
        if (!b.buf) {
            throw std::runtime_error("failed to allocate buffer for the un-rotated keys");
        }
        ggml_backend_buffer_clear(b.buf.get(), 0);
    }
}

ggml_tensor * llama_kv_gather::rows(ggml_context * ctx, const copy & c, uint32_t strm, uint32_t half, uint32_t i0, uint32_t n) const {
    return ggml_view_2d(ctx, c.k, c.k->ne[0], n, c.k->nb[1], ((2*strm + half)*n_slots + i0)*c.k->nb[1]);
}

bool llama_kv_gather::move(uint32_t strm, const std::vector<llama_kv_ledger::move> & moves, uint32_t n_kept, bool with_keys) {
    const auto runs = llama_kv_runs(moves);

    const uint32_t from = half[strm];
    const uint32_t to   = 1 - from;

    // what does not move within the cache goes over to the other half all the same
    std::vector<llama_kv_run> all = runs;
    if (runs[0].dst > 0) {
        all.insert(all.begin(), { 0, 0, runs[0].dst });
    }
    for (size_t i = 1; i < all.size(); ++i) {
        GGML_ASSERT(all[i].dst == all[i - 1].dst + all[i - 1].n);
    }
    GGML_ASSERT(all.back().dst + all.back().n == n_kept);

    std::map<ggml_backend_t, std::vector<size_t>> by_backend;
    for (size_t i = 0; i < layers.size(); ++i) {
        by_backend[backends.get(layers[i].k->buffer)].push_back(i);
    }

    for (const auto & [backend, idx] : by_backend) {
        const size_t n_nodes = idx.size()*(12*runs.size() + 4*all.size());

        llama_kv_graph graph(n_nodes);

        ggml_context * ctx = graph.get_ctx();

        // sources and destinations overlap
        const auto shift = [&](ggml_tensor * src, ggml_tensor * dst) {
            graph.expand(ggml_cpy(ctx, ggml_cont(ctx, src), dst));
        };

        for (const size_t i : idx) {
            ggml_tensor * k = layers[i].k_stream[strm];
            ggml_tensor * v = layers[i].v_stream[strm];

            for (const auto & r : runs) {
                if (with_keys || !copies[i].k) {
                    shift(llama_kv_rows(ctx, k, r.src, r.n), llama_kv_rows(ctx, k, r.dst, r.n));
                }
                if (v) {
                    shift(llama_kv_rows(ctx, v, r.src, r.n, v_trans), llama_kv_rows(ctx, v, r.dst, r.n, v_trans));
                }
            }
            if (copies[i].k) {
                for (const auto & r : all) {
                    ggml_tensor * src = rows(ctx, copies[i], strm, from, r.src, r.n);
                    ggml_tensor * dst = rows(ctx, copies[i], strm, to,   r.dst, r.n);

                    graph.expand(ggml_cpy(ctx, src, dst));
                }
            }
        }

        if (!graph.compute(backends, backend)) {
            return false;
        }
    }

    half[strm] = to;

    return true;
}

bool llama_kv_gather::rotate(uint32_t strm, int32_t first, uint32_t n_kept) {
    if (!rope || n_kept == 0) {
        return true;
    }

    std::vector<int32_t> positions;
    for (uint32_t i = 0; i < n_kept; ++i) {
        positions.push_back(first + (int32_t) i);
    }

    std::map<ggml_backend_t, std::vector<size_t>> by_backend;
    for (size_t i = 0; i < layers.size(); ++i) {
        if (copies[i].k) {
            by_backend[backends.get(layers[i].k->buffer)].push_back(i);
        }
    }

    for (const auto & [backend, idx] : by_backend) {
        llama_kv_graph graph(16*idx.size() + 4);

        ggml_context * ctx = graph.get_ctx();

        ggml_tensor * pos = graph.input(positions);

        for (const size_t i : idx) {
            const auto & layer = layers[i];

            ggml_tensor * cur = rows(ctx, copies[i], strm, half[strm], 0, n_kept);

            // rotated as they are, or for the Hadamard product and the quantisation in f32
            if (cur->type != layer.k->type || cur->type == GGML_TYPE_BF16) {
                cur = ggml_cast(ctx, cur, GGML_TYPE_F32);
            }

            cur = rope->build(ctx, cur, pos, layer.il, ggml_backend_buffer_get_type(layer.k->buffer), /*plain =*/ true);

            ggml_tensor * k = layer.k_stream[strm];

            graph.expand(ggml_cpy(ctx, cur, ggml_view_2d(ctx, k, k->ne[0], n_kept, k->nb[1], 0)));
        }

        if (!graph.compute(backends, backend)) {
            return false;
        }
    }

    return true;
}

void llama_kv_gather::set(const std::vector<int32_t> & pos, const std::vector<uint32_t> & strm, const std::vector<uint32_t> & slots) {
    std::vector<int64_t> idxs;
    for (size_t i = 0; i < slots.size(); ++i) {
        idxs.push_back((int64_t) (2*strm[i] + half[strm[i]])*n_slots + slots[i]);
    }

    const ggml_tensor * done = nullptr;

    for (const auto & c : copies) {
        if (c.k && c.pos != done) {
            ggml_backend_tensor_set(c.pos,  pos .data(), 0, pos .size()*sizeof(int32_t));
            ggml_backend_tensor_set(c.idxs, idxs.data(), 0, idxs.size()*sizeof(int64_t));
            done = c.pos;
        }
    }
}

void llama_kv_gather::build(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, uint32_t il) {
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & c = copies[i];

        if (layers[i].il != il || !c.k) {
            continue;
        }

        const int64_t n_tokens = k_cur->ne[2];

        ggml_tensor * cur = ggml_cont_2d(ctx, k_cur, c.k->ne[0], n_tokens);

        cur = rope->build_back(ctx, cur, ggml_view_1d(ctx, c.pos, n_tokens, 0), il, ggml_backend_buffer_get_type(layers[i].k->buffer));

        ggml_build_forward_expand(gf, ggml_set_rows(ctx, c.k, cur, ggml_view_1d(ctx, c.idxs, n_tokens, 0)));
    }
}
