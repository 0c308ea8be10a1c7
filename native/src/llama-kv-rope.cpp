#include "llama-kv-rope.h"

#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <cmath>
#include <stdexcept>

llama_kv_rope::llama_kv_rope(const llama_model & model, const llama_hparams & hparams, const llama_cparams & cparams, std::vector<float> had) :
    model(model), hparams(hparams), cparams(cparams), had(std::move(had)) {
}

bool llama_kv_rope::has(uint32_t il) const {
    return hparams.rope_type != LLAMA_ROPE_TYPE_NONE && hparams.has_rope(il);
}

llama_kv_rope::params llama_kv_rope::get(uint32_t il) const {
    params res;

    res.n_embd_head = hparams.n_embd_head_k(il);
    res.n_head_kv   = hparams.n_embd_k_gqa(il)/res.n_embd_head;
    res.n_rot       = hparams.n_rot(il);
    res.n_nope      = hparams.n_lora_kv > 0 ? res.n_embd_head - res.n_rot : 0;
    res.freq_base   = model.get_rope_freq_base (cparams, il);
    res.freq_scale  = model.get_rope_freq_scale(cparams, il);
    res.factors     = model.get_rope_factors   (cparams, il);

    return res;
}

std::vector<float> llama_kv_rope::read(const ggml_tensor * t) const {
    GGML_ASSERT(t->type == GGML_TYPE_F32);

    std::vector<float> res(ggml_nelements(t));
    ggml_backend_tensor_get(t, res.data(), 0, ggml_nbytes(t));

    return res;
}

bool llama_kv_rope::same(uint32_t il_a, uint32_t il_b) const {
    const params a = get(il_a);
    const params b = get(il_b);

    if (a.n_embd_head != b.n_embd_head || a.n_head_kv != b.n_head_kv || a.n_rot != b.n_rot || a.n_nope != b.n_nope ||
        a.freq_base != b.freq_base || a.freq_scale != b.freq_scale || (a.factors == nullptr) != (b.factors == nullptr)) {
        return false;
    }

    // each layer may hold its own copy of the factors
    return a.factors == b.factors || read(a.factors) == read(b.factors);
}

ggml_tensor * llama_kv_rope::constant(const ggml_tensor * factors, ggml_backend_buffer_type_t buft) {
    auto & res = constants[{ factors, buft }];

    if (!res.t) {
        const std::vector<float> data = factors ? read(factors) : had;
        const int64_t            ne0  = factors ? data.size() : std::lround(std::sqrt((double) had.size()));

        res.ctx.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
        res.t = ggml_new_tensor_2d(res.ctx.get(), GGML_TYPE_F32, ne0, data.size()/ne0);

        res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), buft));
        if (!res.buf) {
            throw std::runtime_error("failed to allocate buffer for the parameters of the rotation");
        }
        ggml_backend_tensor_set(res.t, data.data(), 0, data.size()*sizeof(float));
    }

    return res.t;
}

ggml_tensor * llama_kv_rope::build(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, uint32_t il, ggml_backend_buffer_type_t buft, bool back) {
    const params p = get(il);

    const int64_t n_embd = cur->ne[0];
    const int64_t n_rows = cur->ne[1];

    cur = pos->ne[0] == 1 ?
        ggml_reshape_3d(ctx, cur, p.n_embd_head, p.n_head_kv*n_rows, 1) :
        ggml_reshape_3d(ctx, cur, p.n_embd_head, p.n_head_kv, n_rows);

    ggml_tensor * rot = nullptr;
    if (!had.empty()) {
        rot = constant(nullptr, buft);
        cur = llama_mul_mat_hadamard(ctx, cur, rot);
    }

    ggml_tensor * factors = p.factors ? constant(p.factors, buft) : nullptr;

    // cancels the magnitude factor that ggml applies for YaRN
    const float attn_factor = cparams.yarn_ext_factor != 0.0f ? 1.0f/(1.0f + 0.1f*logf(1.0f/p.freq_scale)) : 1.0f;

    ggml_tensor * nope = nullptr;
    if (p.n_nope > 0) {
        nope = ggml_view_3d(ctx, cur, p.n_nope, cur->ne[1], cur->ne[2], cur->nb[1], cur->nb[2], 0);
        cur  = ggml_view_3d(ctx, cur, p.n_rot,  cur->ne[1], cur->ne[2], cur->nb[1], cur->nb[2], p.n_nope*cur->nb[0]);
    }

    const auto rope = back ? ggml_rope_ext_back : ggml_rope_ext;

    cur = rope(ctx, cur, pos, factors, p.n_rot, hparams.rope_type, cparams.n_ctx_orig_yarn, p.freq_base, p.freq_scale,
            cparams.yarn_ext_factor, attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);

    if (nope) {
        cur = ggml_concat(ctx, nope, cur, 0);
    }
    if (rot) {
        cur = llama_mul_mat_hadamard(ctx, cur, rot);
    }

    return ggml_reshape_2d(ctx, cur, n_embd, n_rows);
}
