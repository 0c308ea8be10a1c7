#pragma once

// what the test programs share: options "key=value", a token file, a chunk schedule, a context

#include "ggml-backend.h"
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

[[noreturn]] static inline void die(const std::string & what) {
    fprintf(stderr, "%s\n", what.c_str());
    exit(1);
}

struct test_options {
    std::map<std::string, std::string> kv;

    test_options(int argc, char ** argv, int first) {
        for (int i = first; i < argc; ++i) {
            const char * eq = strchr(argv[i], '=');
            if (!eq) {
                die(std::string("expected key=value, got ") + argv[i]);
            }
            kv[std::string(argv[i], eq - argv[i])] = eq + 1;
        }
    }

    std::string str(const char * key, const char * def) const {
        const auto it = kv.find(key);
        return it == kv.end() ? def : it->second;
    }

    int num(const char * key, int def) const {
        const auto it = kv.find(key);
        return it == kv.end() ? def : atoi(it->second.c_str());
    }
};

static inline ggml_type type_from_name(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * s = ggml_type_name((ggml_type) i);
        if (s && name == s) {
            return (ggml_type) i;
        }
    }
    die("unknown type " + name);
}

// raw int32
static inline std::vector<llama_token> read_tokens(const std::string & path) {
    FILE * f = fopen(path.c_str(), "rb");
    if (!f) {
        die("cannot read " + path);
    }
    std::vector<llama_token> res;
    llama_token t;
    while (fread(&t, sizeof(t), 1, f) == 1) {
        res.push_back(t);
    }
    fclose(f);
    return res;
}

// "40,40,1x250,7": chunk sizes, with repeats
static inline std::vector<int> parse_chunks(const std::string & s) {
    std::vector<int> res;
    for (size_t i = 0; i < s.size();) {
        char * end = nullptr;
        const int n = (int) strtol(s.c_str() + i, &end, 10);
        const int r = *end == 'x' ? (int) strtol(end + 1, &end, 10) : 1;
        res.insert(res.end(), r, n);
        i = end - s.c_str() + 1;
    }
    return res;
}

// EQUIP_TEST_RPC=HOST:PORT,... adds the devices of these servers to the registry
static inline void add_rpc_server(const std::string & endpoint) {
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    if (!rpc) {
        die("this library has no RPC backend");
    }
    auto * add_server = (ggml_backend_reg_t (*)(const char *)) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server");
    ggml_backend_reg_t reg = add_server(endpoint.c_str());
    if (!reg) {
        die("no server answers at " + endpoint);
    }
    ggml_backend_register(reg);
}

static inline void add_rpc_servers() {
    const char * list = getenv("EQUIP_TEST_RPC");

    const std::string text = list ? list : "";
    for (size_t i = 0; i < text.size();) {
        const size_t end = std::min(text.find(',', i), text.size());
        add_rpc_server(text.substr(i, end - i));
        i = end + 1;
    }
}

// EQUIP_TEST_NGL: layers on the device; all of them, unless it says otherwise. EQUIP_TEST_SPLIT_TENSORS: each layer is divided between devices
static inline llama_model * load_model(const char * path) {
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            fputs(text, stderr);
        }
    }, nullptr);
    if (ggml_backend_reg_count() == 0) { // backends are modules of their own in a portable build
        ggml_backend_load_all_from_path(getenv("EQUIP_TEST_LIB_DIR"));
    }
    add_rpc_servers();
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    if (const char * ngl = getenv("EQUIP_TEST_NGL")) {
        params.n_gpu_layers = atoi(ngl);
    }
    if (getenv("EQUIP_TEST_SPLIT_TENSORS")) {
        params.split_mode = LLAMA_SPLIT_MODE_TENSOR;
    }
    llama_model * model = llama_model_load_from_file(path, params);
    if (!model) {
        die("cannot load the model");
    }
    return model;
}

// options: n_ctx, n_batch, n_ubatch, threads, fa (0|1), type_k, type_v, offload_kqv (0: the cache is in host memory)
static inline llama_context * make_context(llama_model * model, const test_options & opt) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = opt.num("n_ctx", 512);
    params.n_batch         = opt.num("n_batch", params.n_ctx);
    params.n_ubatch        = opt.num("n_ubatch", 64);
    params.n_threads       = opt.num("threads", 1);
    params.n_threads_batch = opt.num("threads", 1);
    params.flash_attn_type = opt.num("fa", 0) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k          = type_from_name(opt.str("type_k", "f16"));
    params.type_v          = type_from_name(opt.str("type_v", "f16"));
    params.offload_kqv     = opt.num("offload_kqv", 1);
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        die("cannot create a context");
    }
    return ctx;
}

// one llama_decode at explicit positions; all: logits of every token, else of the last one
static inline int try_decode(llama_context * ctx, const llama_token * tokens, int n, int n_past, bool all) {
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = n_past + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = all || i == n - 1;
    }
    const int rc = llama_decode(ctx, batch);
    llama_batch_free(batch);
    return rc;
}

static inline void decode(llama_context * ctx, const llama_token * tokens, int n, int n_past, bool all) {
    const int rc = try_decode(ctx, tokens, n, n_past, all);
    if (rc != 0) {
        die("llama_decode returned " + std::to_string(rc));
    }
}
