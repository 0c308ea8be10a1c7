// stop decodes between two graph nodes, carry on, and write down what is kept and what comes out
//
//   abort-step MODEL SPEC OUT tokens=FILE chunks=LIST [key=value ...]
//     SPEC           as in LLAMA_KV_POLICY
//     every=N        each N-th decode is stopped after a few nodes, and then done again
//     n_ctx, n_ubatch, threads, fa, type_k, type_v
//
// OUT holds, for each decode: int32 whether it was stopped; if so, the kept positions after that (int32 count, int32[count]);
// then float32[n_vocab], the logits of its last token
//
// uses llama.h and llama-kv-policy.h only

#include "llama-kv-policy.h"
#include "test-common.h"

// called before each node; counts down to the one that is not computed any more
static bool on_node(void * data) {
    int & left = *(int *) data;
    return left >= 0 && left-- == 0;
}

int main(int argc, char ** argv) {
    if (argc < 4) {
        die("usage: abort-step MODEL SPEC OUT tokens=FILE chunks=LIST [key=value ...]");
    }
    const test_options opt(argc, argv, 4);

    llama_model * model   = load_model(argv[1]);
    const int     n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    llama_kv_policy_set_next(argv[2]);
    llama_context * ctx = make_context(model, opt);
    if (strcmp(llama_kv_policy_name(ctx), "none") == 0) {
        die("the policy is not active");
    }

    int left = -1;
    llama_set_abort_callback(ctx, on_node, &left);

    const std::vector<llama_token> tokens = read_tokens(opt.str("tokens", ""));
    const std::vector<int>         chunks = parse_chunks(opt.str("chunks", ""));
    const int                      every  = opt.num("every", 5);

    FILE * out = fopen(argv[3], "wb");
    if (!out) {
        die(std::string("cannot write ") + argv[3]);
    }

    size_t ok     = 0;
    size_t wanted = 0;

    const auto write = [&](const void * data, size_t size) {
        wanted += size;
        ok     += fwrite(data, 1, size, out);
    };

    int n_past = 0;
    for (size_t i = 0; i < chunks.size(); ++i) {
        const int n = chunks[i];
        if (n_past + n > (int) tokens.size()) {
            die("the chunks need more tokens than there are");
        }

        int32_t stopped = 0;
        if ((int) i % every == every - 1) {
            left    = (int) (i*7919 % 41);
            stopped = try_decode(ctx, tokens.data() + n_past, n, n_past, false) == 2;
            left    = -1;
            if (!stopped) {
                die("the decode was not stopped");
            }
        }

        write(&stopped, sizeof(stopped));
        if (stopped) {
            const int32_t n_kept = llama_kv_policy_get_kept(ctx, 0, nullptr, nullptr, 0);
            std::vector<llama_pos> pos(n_kept);
            std::vector<int32_t>   slot(n_kept);
            llama_kv_policy_get_kept(ctx, 0, pos.data(), slot.data(), n_kept);
            write(&n_kept, sizeof(n_kept));
            write(pos.data(), n_kept*sizeof(llama_pos));
        }

        decode(ctx, tokens.data() + n_past, n, n_past, false);
        write(llama_get_logits_ith(ctx, -1), n_vocab*sizeof(float));
        n_past += n;
    }

    if (fclose(out) != 0 || ok != wanted) {
        die("the file cannot be written");
    }
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
