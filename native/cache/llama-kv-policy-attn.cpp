#include "llama-kv-policy-impl.h"

#include "llama-cparams.h"
#include "llama-hparams.h"

#include "ggml-backend.h"
#include "ggml-cpu-attn.h"
#include "ggml-cpp.h"

#include <algorithm>

// our own CPU kernel for the attention of a few tokens: which nodes take it
// the kernel is part of the CPU backend, which may be a library that is loaded when the program runs

using eligible_t = bool (*)(const ggml_tensor * node);

static eligible_t get_eligible() {
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("CPU");

    return reg ? (eligible_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_cpu_attn_eligible") : nullptr;
}

void llama_kv_policy_mark_attn(const llama_cparams & cparams, ggml_tensor * node) {
    if (cparams.cpu_attn) {
        ggml_cpu_attn_enable(node, cparams.kv_unified && cparams.n_seq_max > 1 ? GGML_CPU_ATTN_MANY : GGML_CPU_ATTN_ON);
    }
}

bool llama_kv_policy_is_ours(const ggml_tensor * node) {
    static const eligible_t eligible = get_eligible();

    return eligible && eligible(node);
}

bool llama_kv_policy_single_is_ours(const llama_cparams & cparams, const llama_hparams & hparams, const llama_kv_cache & kv) {
    const auto ids = kv.get_layer_ids();
    const auto it  = std::find_if(ids.begin(), ids.end(), [&](uint32_t i) { return hparams.n_head_kv(i) > 0; });

    // latent attention stores no V, and its heads are larger than what the kernel covers
    if (it == ids.end() || !cparams.cpu_attn || !cparams.flash_attn || hparams.is_mla()) {
        return false;
    }

    const uint32_t il   = *it;
    const int64_t  n_kv = 256;

    ggml_context_ptr ctx { ggml_init({ 16*ggml_tensor_overhead(), nullptr, /*no_alloc =*/ true }) };

    // as build_attn_mha makes it
    const auto rows = [&](ggml_type type, int64_t n_embd_head) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx.get(), type == GGML_TYPE_F32 ? GGML_TYPE_F16 : type, n_embd_head, hparams.n_head_kv(il), n_kv);

        return ggml_permute(ctx.get(), t, 0, 2, 1, 3);
    };

    ggml_tensor * q    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, hparams.n_embd_head_k(il), 1, hparams.n_head(il));
    ggml_tensor * mask = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, n_kv, 1);
    ggml_tensor * node = ggml_flash_attn_ext(ctx.get(), q, rows(kv.type_k(), hparams.n_embd_head_k(il)), rows(kv.type_v(), hparams.n_embd_head_v(il)),
            mask, 1.0f, hparams.f_max_alibi_bias, hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f);

    ggml_prec_set_acc(node, GGML_PREC_F32);
    llama_kv_policy_mark_attn(cparams, node);

    return llama_kv_policy_is_ours(node);
}
