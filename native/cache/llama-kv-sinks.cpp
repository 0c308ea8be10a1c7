#include "llama-kv-sinks.h"

#include "llama-impl.h"
#include "llama-kv-state-io.h"

#include "ggml-backend.h"

#include <algorithm>
#include <stdexcept>

llama_kv_sinks::llama_kv_sinks(llama_kv_rope & rope, llama_kv_backends & backends, const std::vector<llama_kv_layer> & layers, const llama_kv_where & where,
        uint32_t n_seq) :
    rope(rope), backends(backends), layers(layers), where(where), n_seq(n_seq) {
    backend = llama_kv_backend_init(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), 1);
    if (!backend) {
        throw std::runtime_error("failed to initialize CPU backend");
    }

    for (size_t i = 0; i < layers.size(); ++i) {
        if (!rope.has(layers[i].il)) {
            continue;
        }

        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(layers[i].k->buffer);

        auto it = groups.begin();
        while (it != groups.end() && !(it->buft == buft && rope.same(layers[it->idx[0]].il, layers[i].il))) {
            ++it;
        }
        if (it == groups.end()) {
            it = groups.insert(it, group());
            it->buft = buft;
            it->host = ggml_backend_buft_is_host(buft) && !llama_kv_env_is("LLAMA_KV_SINKS", "graph");
        }
        it->idx.push_back(i);
    }

    for (auto & g : groups) {
        if (!g.host) {
            g.keys = llama_kv_keys_of(layers, g.idx);
        }
    }
}

void llama_kv_sinks::resize(uint32_t n) {
    n_tokens = n;

    graphs.clear();
    for (auto & g : groups) {
        g.orig = g.delta = g.slots = nullptr;
        g.buf.reset();
        g.ctx.reset();
    }

    if (n == 0) {
        return;
    }

    graphs.resize(groups.size()*n_seq);

    for (auto & g : groups) {
        g.ctx.reset(ggml_init({ 3*ggml_tensor_overhead(), nullptr, true }));

        g.orig = ggml_new_tensor_4d(g.ctx.get(), GGML_TYPE_F32, layers[g.idx[0]].k->ne[0], n, g.idx.size(), n_seq);
        if (!g.host) {
            g.delta = ggml_new_tensor_1d(g.ctx.get(), GGML_TYPE_I32, n_seq);
            g.slots = ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_I64, n, n_seq);

            g.delta_set.assign(n_seq, 0);
            g.slots_set.assign(n_seq, {});
            g.rotated  .assign(n_seq, nullptr);
        }

        g.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(g.ctx.get(), g.host ? ggml_backend_cpu_buffer_type() : g.buft));
        if (!g.buf) {
            throw std::runtime_error("failed to allocate buffer for the original keys of the protected tokens");
        }
        ggml_backend_buffer_clear(g.buf.get(), 0);
    }
}

void llama_kv_sinks::grow(uint32_t n) {
    if (n <= n_tokens) {
        return;
    }

    // [group] of f32 [n_embd_k_gqa, n_tokens, n_layer, n_seq]
    std::vector<std::vector<uint8_t>> kept;
    for (const auto & g : groups) {
        kept.emplace_back(g.orig ? ggml_nbytes(g.orig) : 0);
        if (g.orig) {
            ggml_backend_tensor_get(g.orig, kept.back().data(), 0, kept.back().size());
        }
    }

    const uint32_t n_before = n_tokens;

    const auto put_back = [&]() {
        for (size_t i = 0; i < groups.size(); ++i) {
            const auto & g = groups[i];
            if (kept[i].empty()) {
                continue;
            }
            const size_t size = n_before*g.orig->nb[1];
            for (size_t j = 0; j < g.idx.size()*n_seq; ++j) {
                ggml_backend_tensor_set(g.orig, kept[i].data() + j*size, j*g.orig->nb[2], size);
            }
        }
    };

    try {
        resize(n);
    } catch (const std::exception &) {
        resize(n_before); // what was just given back
        put_back();
        throw;
    }
    put_back();
}

const llama_kv_sinks::group * llama_kv_sinks::find(uint32_t il, size_t & i_layer) const {
    for (const auto & g : groups) {
        for (size_t i = 0; i < g.idx.size(); ++i) {
            if (layers[g.idx[i]].il == il) {
                i_layer = i;
                return &g;
            }
        }
    }

    return nullptr;
}

void llama_kv_sinks::capture(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * keys, uint32_t il, uint32_t seq, uint32_t rank) const {
    ggml_tensor * dst = original(ctx, il, seq, rank, (uint32_t) keys->ne[1]);

    if (dst) {
        ggml_build_forward_expand(gf, ggml_cpy(ctx, rope.unwrap(ctx, keys, il, ggml_backend_buffer_get_type(dst->view_src->buffer)), dst));
    }
}

ggml_tensor * llama_kv_sinks::original(ggml_context * ctx, uint32_t il, uint32_t seq, uint32_t rank, uint32_t n) const {
    size_t i = 0;

    const auto * g = find(il, i);

    return !g ? nullptr : ggml_view_2d(ctx, g->orig, g->orig->ne[0], n, g->orig->nb[1],
            rank*g->orig->nb[1] + i*g->orig->nb[2] + seq*g->orig->nb[3]);
}

void llama_kv_sinks::copy(uint32_t src, uint32_t dst) {
    std::vector<uint8_t> tmp;

    for (const auto & g : groups) {
        if (g.orig) {
            tmp.resize(g.orig->nb[3]);

            ggml_backend_tensor_get(g.orig, tmp.data(), src*g.orig->nb[3], tmp.size());
            ggml_backend_tensor_set(g.orig, tmp.data(), dst*g.orig->nb[3], tmp.size());
        }
    }
}

void llama_kv_sinks::state_write(llama_kv_state_writer & out, uint32_t seq, uint32_t n) const {
    for (const auto & layer : layers) {
        size_t i = 0;
        const auto * g = find(layer.il, i);
        if (!g || n == 0) {
            continue;
        }
        uint8_t * to = out.room(n*g->orig->nb[1]);
        if (to) {
            ggml_backend_tensor_get(g->orig, to, i*g->orig->nb[2] + seq*g->orig->nb[3], n*g->orig->nb[1]);
        }
    }
}

void llama_kv_sinks::state_read(llama_kv_state_reader & in, uint32_t seq, uint32_t n, bool is_check) {
    for (const auto & layer : layers) {
        size_t i = 0;
        const auto * g = find(layer.il, i);
        if (!g || n == 0) {
            continue;
        }
        const size_t    size = n*layer.k->ne[0]*sizeof(float);
        const uint8_t * from = in.take(size);
        if (!is_check) {
            ggml_backend_tensor_set(g->orig, from, i*g->orig->nb[2] + seq*g->orig->nb[3], size);
        }
    }
}

llama_kv_sinks::graph & llama_kv_sinks::get_graph(size_t i_group, uint32_t seq, uint32_t n) {
    const auto & g = groups[i_group];

    auto & res = graphs[i_group*n_seq + seq];

    if (res.n == n) {
        return res;
    }

    const int64_t n_layer = g.idx.size();
    const int64_t n_embd  = g.orig->ne[0];

    res = {};
    res.ctx.reset(ggml_init({ 32*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));

    ggml_context * ctx = res.ctx.get();

    res.gf  = ggml_new_graph(ctx);
    res.pos = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    res.out = ggml_new_tensor_2d(ctx, layers[g.idx[0]].k->type, n_embd, n*n_layer);

    // one position for the tokens of all layers
    ggml_tensor * cur = ggml_view_3d(ctx, g.orig, n_embd, n, n_layer, g.orig->nb[1], g.orig->nb[2], seq*g.orig->nb[3]);
    if (n != n_tokens) {
        cur = ggml_cont(ctx, cur);
    }
    cur = rope.build(ctx, ggml_reshape_2d(ctx, cur, n_embd, n*n_layer), res.pos, layers[g.idx[0]].il, ggml_backend_cpu_buffer_type(), /*plain =*/ true);

    ggml_build_forward_expand(res.gf, ggml_cpy(ctx, cur, res.out));

    res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type()));
    if (!res.buf) {
        throw std::runtime_error("failed to allocate buffer for the rotation of the protected tokens");
    }
    res.n = n;

    return res;
}

bool llama_kv_sinks::rewrite(uint32_t seq, int32_t delta, const uint32_t * rows, uint32_t n) {
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        auto & g = groups[ig];

        if (!g.host) {
            // each write waits for the device; sinks stay where they are, and so do they under true positions
            const std::vector<int64_t> wide(rows, rows + n);

            if (g.delta_set[seq] != delta || g.slots_set[seq].empty()) {
                g.delta_set[seq] = delta;
                ggml_backend_tensor_set(g.delta, &delta, seq*sizeof(delta), sizeof(delta));
                traffic.n_writes++;
            }
            if (g.slots_set[seq] != wide) {
                g.slots_set[seq] = wide;
                ggml_backend_tensor_set(g.slots, wide.data(), seq*g.slots->nb[1], n*sizeof(int64_t));
                traffic.n_writes++;
            }
            continue;
        }

        auto & gr = get_graph(ig, seq, n);

        ggml_backend_tensor_set(gr.pos, &delta, 0, sizeof(delta));

        if (ggml_backend_graph_compute(backend.get(), gr.gf) != GGML_STATUS_SUCCESS) {
            return false;
        }

        const size_t row = gr.out->nb[1];

        const auto * data = (const uint8_t *) gr.out->data;

        for (const size_t idx : g.idx) {
            ggml_tensor * k = layers[idx].k_stream[where.stream_of(seq)];

            // one write per run of neighbouring rows: a single one, as a rule
            for (uint32_t i0 = 0; i0 < n; ) {
                uint32_t i1 = i0 + 1;
                while (i1 < n && rows[i1] == rows[i1 - 1] + 1) {
                    i1++;
                }
                ggml_backend_tensor_set(k, data + i0*row, rows[i0]*row, (i1 - i0)*row);
                i0 = i1;
            }

            data += n*row;
        }
    }

    return true;
}

bool llama_kv_sinks::rewrite_many(uint32_t seq, int32_t delta, uint32_t rank, const uint32_t * rows, uint32_t n) {
    for (const auto & g : groups) {
        llama_kv_graph graph(16*g.idx.size() + 8);

        ggml_context * ctx = graph.get_ctx();

        ggml_tensor * pos  = graph.input(std::vector<int32_t> { delta });
        ggml_tensor * idxs = graph.input(std::vector<int64_t>(rows, rows + n));

        for (const size_t idx : g.idx) {
            const auto & layer = layers[idx];

            ggml_tensor * cur = rope.build(ctx, original(ctx, layer.il, seq, rank, n), pos, layer.il, g.buft, /*plain =*/ true);

            graph.expand(ggml_set_rows(ctx, layer.k_stream[where.stream_of(seq)], cur, idxs));
        }

        if (!graph.compute(backends, backends.get(layers[g.idx[0]].k->buffer))) {
            return false;
        }
    }

    return true;
}

bool llama_kv_sinks::in_graph(uint32_t il) const {
    size_t i = 0;

    const auto * g = find(il, i);

    return g && !g->host && g->orig;
}

bool llama_kv_sinks::any_in_graph() const {
    for (const auto & g : groups) {
        if (!g.host) {
            return true;
        }
    }
    return false;
}

void llama_kv_sinks::build(ggml_context * ctx, ggml_cgraph * gf, uint32_t il, uint32_t seq, uint32_t n) const {
    size_t i = 0;

    const auto * g = find(il, i);

    // the first layer of a group, which comes first in every graph, rotates for all of them
    ggml_tensor *& all = g->rotated[seq];

    if (i == 0) {
        const int64_t n_embd  = g->orig->ne[0];
        const int64_t n_layer = (int64_t) g->idx.size();

        ggml_tensor * cur = ggml_view_3d(ctx, g->orig, n_embd, n, n_layer, g->orig->nb[1], g->orig->nb[2], seq*g->orig->nb[3]);
        if (n != n_tokens) {
            cur = ggml_cont(ctx, cur);
        }
        ggml_tensor * pos = ggml_view_1d(ctx, g->delta, 1, seq*g->delta->nb[0]);

        all = rope.build(ctx, ggml_reshape_2d(ctx, cur, n_embd, n*n_layer), pos, il, g->buft, /*plain =*/ true);
    }

    ggml_tensor * idxs = ggml_view_1d(ctx, g->slots, n, seq*g->slots->nb[1]);

    if (g->keys.t && i == 0) {
        ggml_tensor * to = ggml_view_3d(ctx, g->keys.t, all->ne[0], g->keys.t->ne[1], g->keys.t->ne[3], g->keys.t->nb[1], g->keys.t->nb[3],
                where.stream_of(seq)*g->keys.t->nb[2]);

        ggml_build_forward_expand(gf, ggml_set_rows(ctx, to, ggml_reshape_3d(ctx, all, all->ne[0], n, g->keys.t->ne[3]), idxs));
    }
    if (g->keys.t) {
        return;
    }

    ggml_tensor * cur = ggml_view_2d(ctx, all, all->ne[0], n, all->nb[1], i*n*all->nb[1]);

    ggml_build_forward_expand(gf, ggml_set_rows(ctx, layers[g->idx[i]].k_stream[where.stream_of(seq)], cur, idxs));
}
