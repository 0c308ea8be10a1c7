#include "llama-kv-sinks.h"

#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

ggml_backend_ptr llama_kv_backend_init(ggml_backend_dev_t dev, int n_threads) {
    ggml_backend_ptr res { dev ? ggml_backend_dev_init(dev, nullptr) : nullptr };

    if (res) {
        auto * reg = ggml_backend_dev_backend_reg(dev);
        auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
        if (set_n_threads) {
            set_n_threads(res.get(), n_threads);
        }
    }

    return res;
}

llama_kv_sinks::llama_kv_sinks(
        const llama_model & model,
        const llama_hparams & hparams,
        std::vector<layer> layers_in,
        uint32_t n_stream,
        std::vector<float> rot) :
    model(model), hparams(hparams), layers(std::move(layers_in)), n_stream(n_stream), rot(std::move(rot)) {
    backend = llama_kv_backend_init(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), 1);
    if (!backend) {
        throw std::runtime_error("failed to initialize CPU backend");
    }
}

void llama_kv_sinks::attach(const llama_cparams & cparams_in) {
    cparams = &cparams_in;
    groups.clear();

    for (size_t i = 0; i < layers.size(); ++i) {
        const uint32_t il = layers[i].il;

        if (!hparams.has_rope(il)) {
            continue;
        }

        group cur;
        cur.n_embd_head = hparams.n_embd_head_k(il);
        cur.n_head_kv   = hparams.n_head_kv(il);
        cur.n_rot       = hparams.n_rot(il);
        cur.freq_base   = model.get_rope_freq_base (*cparams, il);
        cur.freq_scale  = model.get_rope_freq_scale(*cparams, il);
        cur.factors     = model.get_rope_factors   (*cparams, il);

        const auto same = [&](const group & g) {
            if (g.n_embd_head != cur.n_embd_head || g.n_head_kv != cur.n_head_kv || g.n_rot != cur.n_rot ||
                g.freq_base != cur.freq_base || g.freq_scale != cur.freq_scale || (g.factors == nullptr) != (cur.factors == nullptr)) {
                return false;
            }

            if (!g.factors || g.factors == cur.factors) {
                return true;
            }

            // each layer may hold its own copy of the factors
            if (ggml_nbytes(g.factors) != ggml_nbytes(cur.factors)) {
                return false;
            }

            std::vector<uint8_t> a(ggml_nbytes(g.factors));
            std::vector<uint8_t> b(a.size());
            ggml_backend_tensor_get(g.factors,   a.data(), 0, a.size());
            ggml_backend_tensor_get(cur.factors, b.data(), 0, b.size());

            return a == b;
        };

        auto it = groups.begin();
        while (it != groups.end() && !same(*it)) {
            ++it;
        }
        if (it == groups.end()) {
            it = groups.insert(it, std::move(cur));
        }
        it->idx.push_back(i);
    }
}

void llama_kv_sinks::resize(uint32_t n) {
    n_tokens = n;

    graphs.clear();
    n_built.clear();
    buf_orig.reset();

    if (n == 0 || groups.empty()) {
        return;
    }

    ctx_orig.reset(ggml_init({ groups.size()*ggml_tensor_overhead(), nullptr, true }));

    for (auto & g : groups) {
        g.orig = ggml_new_tensor_4d(ctx_orig.get(), GGML_TYPE_F32, g.n_embd_head*g.n_head_kv, n, g.idx.size(), n_stream);
    }

    buf_orig.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_orig.get(), ggml_backend_cpu_buffer_type()));
    if (!buf_orig) {
        throw std::runtime_error("failed to allocate buffer for the original keys of the protected tokens");
    }
    ggml_backend_buffer_clear(buf_orig.get(), 0);

    graphs .resize(groups.size()*n_stream);
    n_built.assign(groups.size()*n_stream, 0);
}

ggml_tensor * llama_kv_sinks::original(ggml_context * ctx, int32_t il, uint32_t strm, uint32_t rank, uint32_t n) const {
    for (const auto & g : groups) {
        for (size_t i = 0; i < g.idx.size(); ++i) {
            if ((int32_t) layers[g.idx[i]].il == il) {
                return ggml_view_2d(ctx, g.orig, g.orig->ne[0], n, g.orig->nb[1],
                        rank*g.orig->nb[1] + i*g.orig->nb[2] + strm*g.orig->nb[3]);
            }
        }
    }

    return nullptr;
}

void llama_kv_sinks::copy(uint32_t src, uint32_t dst) {
    for (const auto & g : groups) {
        if (g.orig) {
            auto * data = (uint8_t *) g.orig->data;

            memcpy(data + dst*g.orig->nb[3], data + src*g.orig->nb[3], g.orig->nb[3]);
        }
    }
}

llama_kv_sinks::graph & llama_kv_sinks::get_graph(size_t i_group, uint32_t strm, uint32_t n) {
    const auto & g = groups[i_group];

    auto & res = graphs [i_group*n_stream + strm];
    auto & nb  = n_built[i_group*n_stream + strm];

    if (nb == n) {
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

    ggml_tensor * factors = nullptr;
    if (g.factors) {
        factors = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ggml_nelements(g.factors));
    }

    const int32_t n_had = (int32_t) std::lround(std::sqrt((double) rot.size()));
    if (n_had > 0) {
        res.rot = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_had, n_had);
    }

    // [n_embd, n, n_layer] -> [n_embd_head, n_head_kv*n*n_layer, 1]: one position for all of them
    ggml_tensor * cur = ggml_view_3d(ctx, g.orig, n_embd, n, n_layer, g.orig->nb[1], g.orig->nb[2], strm*g.orig->nb[3]);
    if (n != n_tokens) {
        cur = ggml_cont(ctx, cur);
    }
    cur = ggml_reshape_3d(ctx, cur, g.n_embd_head, g.n_head_kv*n*n_layer, 1);

    if (res.rot) {
        cur = llama_mul_mat_hadamard(ctx, cur, res.rot);
    }

    // the original carries the magnitude factor already: cancel the one that ggml applies for YaRN
    const float attn_factor = cparams->yarn_ext_factor != 0.0f ? 1.0f/(1.0f + 0.1f*logf(1.0f/g.freq_scale)) : 1.0f;

    cur = ggml_rope_ext(ctx, cur, res.pos, factors, g.n_rot, hparams.rope_type, cparams->n_ctx_orig_yarn, g.freq_base, g.freq_scale,
            cparams->yarn_ext_factor, attn_factor, cparams->yarn_beta_fast, cparams->yarn_beta_slow);

    if (res.rot) {
        cur = llama_mul_mat_hadamard(ctx, cur, res.rot);
    }

    cur = ggml_cpy(ctx, ggml_reshape_2d(ctx, cur, n_embd, n*n_layer), res.out);
    ggml_build_forward_expand(res.gf, cur);

    res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type()));
    if (!res.buf) {
        throw std::runtime_error("failed to allocate buffer for the rotation of the protected tokens");
    }

    if (factors) {
        GGML_ASSERT(g.factors->type == GGML_TYPE_F32);

        std::vector<uint8_t> tmp(ggml_nbytes(g.factors));
        ggml_backend_tensor_get(g.factors, tmp.data(), 0, tmp.size());
        ggml_backend_tensor_set(factors,   tmp.data(), 0, tmp.size());
    }
    if (res.rot) {
        ggml_backend_tensor_set(res.rot, rot.data(), 0, rot.size()*sizeof(float));
    }

    nb = n;

    return res;
}

bool llama_kv_sinks::rewrite(uint32_t strm, int32_t delta, const uint32_t * slots, uint32_t n) {
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        auto & gr = get_graph(ig, strm, n);

        ggml_backend_tensor_set(gr.pos, &delta, 0, sizeof(delta));

        if (ggml_backend_graph_compute(backend.get(), gr.gf) != GGML_STATUS_SUCCESS) {
            return false;
        }

        const size_t row = gr.out->nb[1];

        const auto * data = (const uint8_t *) gr.out->data;

        for (const size_t idx : groups[ig].idx) {
            ggml_tensor * k = layers[idx].k_stream[strm];

            // one write per run of neighbouring slots: a single one, as a rule
            for (uint32_t i0 = 0; i0 < n; ) {
                uint32_t i1 = i0 + 1;
                while (i1 < n && slots[i1] == slots[i1 - 1] + 1) {
                    i1++;
                }
                ggml_backend_tensor_set(k, data + i0*row, slots[i0]*row, (i1 - i0)*row);
                i0 = i1;
            }

            data += n*row;
        }
    }

    return true;
}
