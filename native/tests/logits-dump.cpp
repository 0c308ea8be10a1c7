// write the logits of a run as raw float32: the same program is run on two libraries and the files are compared
//
//   logits-dump MODEL OUT [key=value ...]
//     tokens=FILE    raw int32; default: a fixed pseudo-random sequence
//     chunks=LIST    one llama_decode each, e.g. 40,40,1x250
//     greedy=N       then N greedy steps
//     all=1          logits of every token, not only of each chunk's last one
//     evict=B protect=P
//                    drop tokens with llama_memory_seq_rm so that B are kept: before a single token, after a longer chunk;
//                    the oldest one at position >= P goes first. This is policy "none" on a kept set that the caller chose.
//     n_ctx, n_batch, n_ubatch, threads, fa, type_k, type_v, offload_kqv
//
// uses llama.h only

#include "test-common.h"

int main(int argc, char ** argv) {
    if (argc < 3) {
        die("usage: logits-dump MODEL OUT [key=value ...]");
    }
    const test_options opt(argc, argv, 3);

    llama_model   * model   = load_model(argv[1]);
    llama_context * ctx     = make_context(model, opt);
    llama_memory_t  mem     = llama_get_memory(ctx);
    const int       n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    const std::vector<int> chunks  = parse_chunks(opt.str("chunks", "16"));
    const bool             all     = opt.num("all", 0) != 0;
    const int              budget  = opt.num("evict", 0);
    const int              protect = opt.num("protect", 0);

    int n_tokens = 0;
    for (const int n : chunks) {
        n_tokens += n;
    }

    std::vector<llama_token> tokens;
    if (opt.kv.count("tokens")) {
        tokens = read_tokens(opt.str("tokens", ""));
    } else {
        uint32_t state = 1;
        for (int i = 0; i < n_tokens; ++i) {
            state = state*1664525u + 1013904223u;
            tokens.push_back((llama_token) ((state >> 8) % n_vocab));
        }
    }
    if ((int) tokens.size() < n_tokens) {
        die("the chunks need more tokens than there are");
    }

    FILE * out = fopen(argv[2], "wb");
    if (!out) {
        die(std::string("cannot write ") + argv[2]);
    }

    std::vector<int> kept;

    const auto evict = [&](size_t n_max) {
        while (kept.size() > n_max) {
            size_t i = 0;
            while (kept[i] < protect) {
                ++i;
            }
            if (!llama_memory_seq_rm(mem, 0, kept[i], kept[i] + 1)) {
                die("llama_memory_seq_rm failed");
            }
            kept.erase(kept.begin() + i);
        }
    };

    int n_past = 0;

    const auto step = [&](const llama_token * toks, int n) {
        if (budget > 0 && n == 1) {
            evict(budget - 1);
        }
        decode(ctx, toks, n, n_past, all);
        for (int i = 0; i < n; ++i) {
            kept.push_back(n_past + i);
        }
        n_past += n;
        for (int i = all ? 0 : n - 1; i < n; ++i) {
            const float * logits = llama_get_logits_ith(ctx, i);
            if (!logits || fwrite(logits, sizeof(float), n_vocab, out) != (size_t) n_vocab) {
                die("no logits, or the file cannot be written");
            }
        }
        if (budget > 0) {
            evict(budget);
        }
    };

    int pos = 0;
    for (const int n : chunks) {
        step(tokens.data() + pos, n);
        pos += n;
    }

    for (int i = 0; i < opt.num("greedy", 0); ++i) {
        const float * logits = llama_get_logits_ith(ctx, -1);
        llama_token best = 0;
        for (int t = 1; t < n_vocab; ++t) {
            if (logits[t] > logits[best]) {
                best = t;
            }
        }
        step(&best, 1);
    }

    if (fclose(out) != 0) {
        die("the file cannot be written");
    }
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
