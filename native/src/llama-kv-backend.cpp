#include "llama-kv-backend.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

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

ggml_backend_t llama_kv_backends::get(ggml_backend_buffer_t buffer) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));
    if (!dev) {
        dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    }

    auto & e = entries[dev];
    if (!e.backend) {
        e.backend = llama_kv_backend_init(dev, n_threads);
    }

    return e.backend.get();
}

bool llama_kv_backends::alloc(ggml_backend_t backend, ggml_cgraph * gf) {
    if (!backend) {
        return false;
    }

    auto & e = entries[ggml_backend_get_device(backend)];
    if (!e.galloc) {
        e.galloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
    }

    return ggml_gallocr_alloc_graph(e.galloc.get(), gf);
}

bool llama_kv_backends::compute(ggml_backend_t backend, ggml_cgraph * gf) {
    if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
        return false;
    }

    ggml_backend_synchronize(backend);

    return true;
}
