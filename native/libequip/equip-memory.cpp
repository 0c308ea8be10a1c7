#include "equip-internal.h"

#include <algorithm>
#include <cstdio>

std::vector<ggml_backend_dev_t> equip_devices() {
    std::vector<ggml_backend_dev_t> res;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev  = ggml_backend_dev_get(i);
        const auto         type = ggml_backend_dev_type(dev);
        if (type != GGML_BACKEND_DEVICE_TYPE_CPU && type != GGML_BACKEND_DEVICE_TYPE_ACCEL) {
            res.push_back(dev);
        }
    }
    return res;
}

uint64_t equip_gpu_memory_free(int * n_devices) {
    const auto devices = equip_devices();

    uint64_t res = 0;
    for (ggml_backend_dev_t dev : devices) {
        size_t free  = 0;
        size_t total = 0;
        ggml_backend_dev_memory(dev, &free, &total);
        res += free;
    }
    if (n_devices) {
        *n_devices = (int) devices.size();
    }
    return res;
}

static double mb(double bytes) {
    return bytes / (1024.0 * 1024.0);
}

void equip_check_model_memory(uint64_t model_bytes, bool use_gpu) {
    int            n_gpu = 0;
    const uint64_t gpu   = use_gpu ? equip_gpu_memory_free(&n_gpu) : 0;
    const uint64_t host  = (uint64_t) llama_kv_policy_memory_free();

    if (host > 0 && model_bytes > host + gpu) {
        equip_fail(EQUIP_ERR_MEMORY, "the model needs %.0f MB and %.0f MB are free: try a smaller model or a smaller quantisation of this one%s",
                mb(model_bytes), mb(host + gpu), n_gpu > 0 ? "" : ", or close other programs");
    }
}

// activations of one chunk: a generous sum of the widest tensors that live at once, no more than a guess
static double compute_bytes(const equip_model_state & model, const equip_session_params & params) {
    const double n_tokens = params.cparams.n_ubatch;
    const double n_embd   = llama_model_n_embd(model.model);
    const double n_head   = llama_model_n_head(model.model);
    const double n_vocab  = llama_vocab_n_tokens(model.vocab);

    double res = n_tokens * (n_embd * 16 + params.n_slots * 2) * 4 + n_vocab * 8;
    if (params.cparams.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
        res += n_tokens * n_head * params.n_slots * 4; // the softmax, [n_slots, n_tokens, n_head] f32
    }
    return res;
}

void equip_check_session_memory(const equip_model_state & model, const equip_session_params & params) {
    const double kv = (double) model.slot_bytes(params.cparams.type_k, params.cparams.type_v, false) * params.n_slots +
                      (double) model.slot_bytes(params.cparams.type_k, params.cparams.type_v, true)  * params.n_swa_slots;
    const double compute = compute_bytes(model, params);

    // layers on a device keep their part of the cache there
    const double n_layer  = std::max(1, llama_model_n_layer(model.model));
    const double on_gpu   = params.offload_kv ? std::min(1.0, model.n_gpu_layers / n_layer) : 0.0;
    const double needed[] = { (kv + compute) * (1 - on_gpu), (kv + compute) * on_gpu };
    const double free[]   = { (double) llama_kv_policy_memory_free(), on_gpu > 0 ? (double) equip_gpu_memory_free(nullptr) : 0.0 };

    for (int i = 0; i < 2; ++i) {
        // a device that reports nothing is left to its driver
        if (free[i] > 0 && needed[i] > free[i]) {
            equip_fail(EQUIP_ERR_MEMORY, "the session needs %.0f MB%s (KV cache of %lld slots: %.0f MB, compute: %.0f MB) and %.0f MB are free: "
                    "try a smaller %s, type_k=q8_0 and type_v=q8_0, or a smaller n_ubatch",
                    mb(needed[i]), i == 0 ? "" : " on the device", (long long) params.n_slots, mb(kv), mb(compute), mb(free[i]),
                    params.policy == "none" ? "n_ctx" : "budget");
        }
    }
}
