#include "llama-kv-gather.h"

#include "llama-kv-state-rows.h"

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

ggml_tensor * llama_kv_gather::rows(ggml_context * ctx, const copy & c, uint32_t strm, uint32_t half, uint32_t i0, uint32_t n, uint32_t i_head, uint32_t n_head) const {
    const int64_t n_embd = c.k->ne[0]/n_head;

    return ggml_view_2d(ctx, c.k, n_embd, n, c.k->nb[1], ((2*strm + half)*n_slots + i0)*c.k->nb[1] + ggml_row_size(c.k->type, i_head*n_embd));
}

bool llama_kv_gather::move(uint32_t strm, const llama_kv_moves_of & moves_of, bool per_head, uint32_t n_kept, bool with_keys) {
    const uint32_t from = half[strm];
    const uint32_t to   = 1 - from;

    std::map<ggml_backend_t, std::vector<size_t>> by_backend;
    for (size_t i = 0; i < layers.size(); ++i) {
        by_backend[backends.get(layers[i].k->buffer)].push_back(i);
    }

    struct part { size_t i; uint32_t h; uint32_t n_head; std::vector<llama_kv_run> runs; };

    for (const auto & [backend, idx] : by_backend) {
        std::vector<part> parts;
        size_t n_nodes = 0;

        for (const size_t i : idx) {
            const uint32_t n_head = per_head ? layers[i].n_head_kv : 1;

            for (uint32_t h = 0; h < n_head; ++h) {
                parts.push_back({ i, h, n_head, llama_kv_runs(moves_of(i, h)) });
                n_nodes += 16*parts.back().runs.size() + 4;
            }
        }

        llama_kv_graph graph(n_nodes);

        ggml_context * ctx = graph.get_ctx();

        // sources and destinations overlap
        const auto shift = [&](ggml_tensor * src, ggml_tensor * dst) {
            graph.expand(ggml_cpy(ctx, ggml_cont(ctx, src), dst));
        };

        for (const auto & [i, h, n_head, runs] : parts) {
            ggml_tensor * k = layers[i].k_stream[strm];
            ggml_tensor * v = layers[i].v_stream[strm];

            for (const auto & r : runs) {
                if (with_keys || !copies[i].k) {
                    shift(llama_kv_rows(ctx, k, r.src, r.n, false, h, n_head), llama_kv_rows(ctx, k, r.dst, r.n, false, h, n_head));
                }
                if (v) {
                    shift(llama_kv_rows(ctx, v, r.src, r.n, v_trans, h, n_head), llama_kv_rows(ctx, v, r.dst, r.n, v_trans, h, n_head));
                }
            }

            if (!copies[i].k) {
                continue;
            }

            // what does not move within the cache goes over to the other half all the same
            std::vector<llama_kv_run> all = runs;
            if (all.empty() || all[0].dst > 0) {
                all.insert(all.begin(), { 0, 0, all.empty() ? n_kept : all[0].dst });
            }
            for (size_t j = 1; j < all.size(); ++j) {
                GGML_ASSERT(all[j].dst == all[j - 1].dst + all[j - 1].n);
            }
            GGML_ASSERT(all.back().dst + all.back().n == n_kept);

            for (const auto & r : all) {
                ggml_tensor * src = rows(ctx, copies[i], strm, from, r.src, r.n, h, n_head);
                ggml_tensor * dst = rows(ctx, copies[i], strm, to,   r.dst, r.n, h, n_head);

                graph.expand(ggml_cpy(ctx, src, dst));
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

void llama_kv_gather::state_write(llama_kv_state_writer & out, uint32_t strm, const std::vector<uint32_t> & slots) const {
    for (const auto & c : copies) {
        if (c.k) {
            llama_kv_state_write_rows(out, c.k, (size_t) (2*strm + half[strm])*n_slots*c.k->nb[1], slots);
        }
    }
}

void llama_kv_gather::state_read(llama_kv_state_reader & in, uint32_t strm, const std::vector<uint32_t> & slots, bool is_check) {
    for (const auto & c : copies) {
        if (c.k) {
            llama_kv_state_read_rows(in, c.k, (size_t) (2*strm + half[strm])*n_slots*c.k->nb[1], slots, is_check);
        }
    }
}
