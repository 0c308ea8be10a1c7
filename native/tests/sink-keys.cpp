// after any number of evictions the stored keys of the sinks are, bit for bit, one rotation of their originals
//
//   sink-keys MODEL SPEC [key=value ...]
//     n=3000 every=500      single tokens after the prompt, and how often the keys are compared
//     n_head_kv head_dim rope_base norm=0|1    of the model: the rotation here is ggml's, with these numbers
//     layers=0,1            layers to compare
//     type_k=f16 ...
//
// The original is the key as an f32 cache holds it after the first ubatch; a layer above the first sees rounded values in
// an f16 cache, so only layer 0 is comparable there.

#include "llama-kv-policy.h"
#include "test-check.h"
#include "test-common.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <cstring>

static std::vector<uint8_t> key(llama_context * ctx, int il, int pos) {
    std::vector<uint8_t> res(llama_kv_policy_get_key(ctx, 0, il, pos, nullptr, 0));
    llama_kv_policy_get_key(ctx, 0, il, pos, res.data(), res.size());
    return res;
}

// one ggml_rope_ext of an f32 row, rounded to the cache's type
static std::vector<uint8_t> rotate(const std::vector<uint8_t> & original, int delta, ggml_type type, const test_options & opt) {
    const int head_dim = opt.num("head_dim", 64);
    const int n_head   = opt.num("n_head_kv", 2);

    static ggml_backend_t backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);

    ggml_context * ctx = ggml_init({ 16*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });

    ggml_tensor * x   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, head_dim, n_head, 1);
    ggml_tensor * pos = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    ggml_tensor * out = ggml_new_tensor_1d(ctx, type, head_dim*n_head);

    ggml_tensor * y = ggml_rope_ext(ctx, x, pos, nullptr, head_dim, opt.num("norm", 1) ? GGML_ROPE_TYPE_NORMAL : GGML_ROPE_TYPE_NEOX, 0,
            (float) atof(opt.str("rope_base", "10000").c_str()), 1.0f, 0.0f, 1.0f, 32.0f, 1.0f);

    ggml_cgraph * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, ggml_cpy(ctx, ggml_reshape_1d(ctx, y, head_dim*n_head), out));

    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    ggml_backend_tensor_set(x,   original.data(), 0, original.size());
    ggml_backend_tensor_set(pos, &delta,          0, sizeof(delta));
    ggml_backend_graph_compute(backend, gf);

    std::vector<uint8_t> res(ggml_nbytes(out));
    ggml_backend_tensor_get(out, res.data(), 0, res.size());

    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return res;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        die("usage: sink-keys MODEL SPEC [key=value ...]");
    }
    const test_options opt(argc, argv, 3);

    llama_model * model = load_model(argv[1]);

    const int n_sinks  = 4;
    const int n_prompt = 32;
    const int n_vocab  = llama_vocab_n_tokens(llama_model_get_vocab(model));

    uint32_t state = 1;
    const auto next = [&] {
        state = state*1664525u + 1013904223u;
        return (llama_token) ((state >> 8) % n_vocab);
    };

    std::vector<llama_token> prompt;
    for (int i = 0; i < n_prompt; ++i) {
        prompt.push_back(next());
    }
    const std::vector<int> layers = parse_chunks(opt.str("layers", "0"));

    // originals
    std::map<int, std::vector<std::vector<uint8_t>>> original;
    {
        test_options exact = opt;
        exact.kv["type_k"] = exact.kv["type_v"] = "f32";
        exact.kv["fa"]     = "0";

        llama_kv_policy_set_next(argv[2]);
        llama_context * ctx = make_context(model, exact);
        decode(ctx, prompt.data(), n_prompt, 0, false);
        for (const int il : layers) {
            for (int i = 0; i < n_sinks; ++i) {
                original[il].push_back(key(ctx, il, i));
            }
        }
        llama_free(ctx);
    }

    llama_kv_policy_set_next(argv[2]);
    llama_context * ctx = make_context(model, opt);
    llama_kv_policy_set_next(nullptr);
    decode(ctx, prompt.data(), n_prompt, 0, false);

    const ggml_type type = type_from_name(opt.str("type_k", "f16"));

    int n_compared = 0;
    for (int pos = n_prompt; pos < n_prompt + opt.num("n", 3000); ++pos) {
        const llama_token token = next();
        decode(ctx, &token, 1, pos, false);

        if ((pos + 1) % opt.num("every", 500) != 0) {
            continue;
        }
        const int delta = llama_kv_policy_get_delta(ctx, 0);
        for (const int il : layers) {
            for (int i = 0; i < n_sinks; ++i) {
                const auto stored = key(ctx, il, i);

                CHECK(!stored.empty() && stored == rotate(original[il][i], delta, type, opt),
                        "layer %d, sink %d, %d positions from its original: the stored key is no single rotation of it", il, i, delta);
                CHECK(delta == 0 || stored != rotate(original[il][i], delta - 1, type, opt), "the comparison cannot fail");
                n_compared++;
            }
        }
    }

    llama_kv_policy_stats stats = {};
    llama_kv_policy_get_stats(ctx, 0, &stats);
    printf("%d keys compared, %lld evictions, delta %d, %s\n", n_compared, (long long) stats.n_evicted, llama_kv_policy_get_delta(ctx, 0), n_fail ? "FAILED" : "OK");

    llama_free(ctx);
    llama_model_free(model);

    return n_fail ? EXIT_FAILURE : EXIT_SUCCESS;
}
