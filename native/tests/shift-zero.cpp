// is upstream's own K-shift right? A shift of 0 must change nothing, and neither must one of all cells and of what follows.
//
//   shift-zero MODEL [key=value ...]
//     n=32           tokens before the first shift
//     times=1        shifts, each applied by decoding one token
//     by=0           how far each of them moves all cells; 0: by +1 and -1
//     n_ctx, n_batch, n_ubatch, threads, fa, type_k, type_v
//
// prints the largest difference of the logits from those of a context that was never shifted, in units of their range;
// exit code 2 and a sentence where llama.cpp says that it cannot shift
//
// uses llama.h only

#include "test-common.h"

#include <algorithm>
#include <cmath>

static const int EXIT_CANNOT_SHIFT = 2;

int main(int argc, char ** argv) {
    if (argc < 2) {
        die("usage: shift-zero MODEL [key=value ...]");
    }
    const test_options opt(argc, argv, 2);

    llama_model   * model   = load_model(argv[1]);
    llama_context * ctx     = make_context(model, opt);
    llama_context * ref     = make_context(model, opt);
    llama_memory_t  mem     = llama_get_memory(ctx);
    const int       n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    const int n     = opt.num("n", 32);
    const int times = opt.num("times", 1);
    const int by    = opt.num("by", 0);

    if (!mem) {
        fputs("this model has no memory to shift\n", stderr);
        return EXIT_CANNOT_SHIFT;
    }
    if (!llama_memory_can_shift(mem)) {
        fputs("llama.cpp says that it cannot shift this model's memory\n", stderr);
        return EXIT_CANNOT_SHIFT;
    }

    std::vector<llama_token> tokens;
    uint32_t state = 1;
    for (int i = 0; i < n + times; ++i) {
        state = state*1664525u + 1013904223u;
        tokens.push_back((llama_token) ((state >> 8) % n_vocab));
    }

    decode(ctx, tokens.data(), n, 0, false);
    decode(ref, tokens.data(), n, 0, false);

    double worst = 0.0;

    for (int i = n; i < n + times; ++i) {
        // upstream remembers that there was a shift, so one that adds up to 0 is carried out as well
        llama_memory_seq_add(mem, 0, 0, -1, by + 1);
        llama_memory_seq_add(mem, 0, 0, -1, -1);

        decode(ctx, &tokens[i], 1, i + by*(i - n + 1), false);
        decode(ref, &tokens[i], 1, i, false);

        const float * a = llama_get_logits_ith(ctx, -1);
        const float * b = llama_get_logits_ith(ref, -1);
        if (!a || !b) {
            die("there are no logits");
        }

        double diff = 0.0;
        float  lo   = b[0];
        float  hi   = b[0];
        for (int t = 0; t < n_vocab; ++t) {
            diff = std::isfinite(a[t]) ? std::max(diff, fabs((double) a[t] - b[t])) : INFINITY;
            lo   = std::min(lo, b[t]);
            hi   = std::max(hi, b[t]);
            if (!std::isfinite(a[t])) {
                break;
            }
        }
        worst = std::max(worst, diff / ((double) hi - lo));
    }

    printf("%.3e\n", worst);

    llama_free(ctx);
    llama_free(ref);
    llama_model_free(model);
    return 0;
}
