#include "llama-kv-layer.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

bool llama_kv_has_layer(const std::vector<llama_kv_layer> & layers, int32_t il) {
    return std::any_of(layers.begin(), layers.end(), [&](const auto & layer) { return (int32_t) layer.il == il; });
}

llama_kv_keys llama_kv_keys_of(const std::vector<llama_kv_layer> & layers, const std::vector<size_t> & idx) {
    const ggml_tensor * k = layers[idx[0]].k;

    // ggml-vulkan reorders a graph by what tensors its nodes name, not by memory: it would not see that one reads what the other writes
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(k->buffer));
    if (idx.size() < 2 || ggml_is_quantized(k->type) || (dev && strncmp(ggml_backend_dev_name(dev), "Vulkan", 6) == 0)) {
        return {};
    }

    const ptrdiff_t step = (const char *) layers[idx[1]].k->data - (const char *) k->data;

    for (size_t i = 1; i < idx.size(); ++i) {
        const ggml_tensor * a = layers[idx[i - 1]].k;
        const ggml_tensor * b = layers[idx[i]].k;

        if (b->buffer != k->buffer || b->type != k->type || !ggml_are_same_shape(a, b) || (const char *) b->data - (const char *) a->data != step) {
            return {};
        }
    }
    if (step < (ptrdiff_t) ggml_nbytes(k) || step % (ptrdiff_t) ggml_type_size(k->type) != 0) {
        return {};
    }

    llama_kv_keys res;
    res.ctx.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));

    ggml_tensor * t = ggml_new_tensor_4d(res.ctx.get(), k->type, k->ne[0], k->ne[1], k->ne[2], (int64_t) idx.size());
    t->nb[3] = (size_t) step;

    res.t = ggml_backend_tensor_alloc(k->buffer, t, k->data) == GGML_STATUS_SUCCESS ? t : nullptr;

    return res;
}
