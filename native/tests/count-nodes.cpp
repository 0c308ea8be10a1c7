// what a token adds to a graph: nodes that a device launches, which are all but views; those of the policy are the difference to `none`
// usage: count-nodes MODEL.gguf POLICY key=value...    (n_ubatch, fa, type_k, type_v: as all test programs have them)
// prints a line of JSON: nodes in all, by operation, and as "fusable" keys that CUDA and Vulkan rotate and write at once

#include "llama-kv-policy.h"
#include "test-common.h"

#include "ggml.h"

struct counted {
    bool is_on = false;
    int  n     = 0;
    std::map<std::string, int> by_op;

    int fusable = 0;
    const ggml_tensor * last[2] = {}; // nodes before this one, views included
};

static bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE;
}

// asked of every node of every graph, in the order in which they are computed
static bool on_node(ggml_tensor * t, bool ask, void * data) {
    auto & c = *(counted *) data;
    if (ask && c.is_on && !is_view(t)) {
        c.n++;
        c.by_op[ggml_op_name(t->op)]++;
    }
    if (ask && c.is_on) {
        c.fusable += t->op == GGML_OP_SET_ROWS && t->src[1]->type == GGML_TYPE_I64 && t->src[0] == c.last[1] && c.last[1]->op == GGML_OP_VIEW &&
            c.last[1]->src[0] == c.last[0] && c.last[0]->op == GGML_OP_ROPE;
        c.last[0] = c.last[1];
        c.last[1] = t;
    }
    return false;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        die("usage: count-nodes MODEL.gguf POLICY [key=value ...]");
    }
    const test_options opt(argc, argv, 3);

    llama_model * model = load_model(argv[1]);

    counted c;

    llama_context_params params = llama_context_default_params();
    params.n_ctx             = 1024;
    params.n_ubatch          = opt.num("n_ubatch", 32);
    params.n_threads         = 1;
    params.n_threads_batch   = 1;
    params.flash_attn_type   = opt.num("fa", 1) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k            = type_from_name(opt.str("type_k", "f16"));
    params.type_v            = type_from_name(opt.str("type_v", "f16"));
    params.cb_eval           = on_node;
    params.cb_eval_user_data = &c;

    llama_kv_policy_set_next(argv[2]);
    llama_context * ctx = llama_init_from_model(model, params);
    llama_kv_policy_set_next(nullptr);
    if (!ctx) {
        die(llama_kv_policy_error());
    }

    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    llama_token token = 3;
    for (int pos = 0; pos < 200; ++pos) {
        c.is_on = pos == 199;
        token   = (token*31 + 7) % n_vocab;
        decode(ctx, &token, 1, pos, false);
    }

    printf("{\"nodes\": %d, \"fusable\": %d", c.n, c.fusable);
    for (const auto & [op, n] : c.by_op) {
        printf(", \"%s\": %d", op.c_str(), n);
    }
    printf("}\n");

    llama_free(ctx);
    llama_model_free(model);

    return 0;
}
