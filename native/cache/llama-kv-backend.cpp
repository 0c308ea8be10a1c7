#include "llama-kv-backend.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <cstdlib>
#include <cstring>

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

bool llama_kv_is_cpu(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);

    return ggml_backend_buft_is_host(buft) && (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU);
}

bool llama_kv_env_is(const char * variable, const char * value) {
    const char * given = getenv(variable);

    return given && strcmp(given, value) == 0;
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

llama_kv_graph::llama_kv_graph(size_t n_nodes) :
    ctx(ggml_init({ n_nodes*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false), nullptr, true })),
    gf(ggml_new_graph_custom(ctx.get(), n_nodes, false)) {
}

ggml_tensor * llama_kv_graph::input(ggml_type type, size_t n, const void * data, size_t size) {
    ggml_tensor * res = ggml_new_tensor_1d(ctx.get(), type, n);
    ggml_set_input(res);

    const auto * bytes = (const uint8_t *) data;
    values.push_back({ res, std::vector<uint8_t>(bytes, bytes + size) });

    return res;
}

ggml_tensor * llama_kv_graph::input(const std::vector<int32_t> & data) {
    return input(GGML_TYPE_I32, data.size(), data.data(), data.size()*sizeof(int32_t));
}

ggml_tensor * llama_kv_graph::input(const std::vector<int64_t> & data) {
    return input(GGML_TYPE_I64, data.size(), data.data(), data.size()*sizeof(int64_t));
}

void llama_kv_graph::expand(ggml_tensor * node) {
    ggml_build_forward_expand(gf, node);
}

bool llama_kv_graph::compute(llama_kv_backends & backends, ggml_backend_t backend) {
    if (!backends.alloc(backend, gf)) {
        return false;
    }
    for (const auto & v : values) {
        ggml_backend_tensor_set(v.t, v.data.data(), 0, v.data.size());
    }

    return backends.compute(backend, gf);
}
