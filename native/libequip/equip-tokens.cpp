#include "equip-internal.h"

#include "json.h"

#include <climits>

// what a call that counts tokens or bytes answers when there is nothing to count
static const int32_t FAILED = INT32_MIN;

static const equip_model_state & check_vocab(const equip_model * model) {
    if (!model) {
        equip_fail(EQUIP_ERR_USAGE, "no model is given");
    }
    if (llama_vocab_type(model->state->vocab) == LLAMA_VOCAB_TYPE_NONE) {
        equip_fail(EQUIP_ERR_UNSUPPORTED, "the model has no tokenizer");
    }
    return *model->state;
}

static void check_token(const equip_model_state & m, int32_t token) {
    const int32_t n_vocab = llama_vocab_n_tokens(m.vocab);
    if (token < 0 || token >= n_vocab) {
        equip_fail(EQUIP_ERR_USAGE, "the token %d is outside the vocabulary of %d", token, n_vocab);
    }
}

int32_t equip_tokenize(equip_model * model, const char * text, int32_t n_text, int add_special, int parse_special, int32_t * tokens, int32_t n_max) {
    return equip_guard(FAILED, [&]() -> int32_t {
        const auto & m = check_vocab(model);
        if (n_text < 0 || (n_text > 0 && !text) || n_max < 0 || (n_max > 0 && !tokens)) {
            equip_fail(EQUIP_ERR_USAGE, "a length is negative or a buffer is missing");
        }

        // upstream asserts that the tokens to add exist
        const bool add = add_special &&
            !(llama_vocab_get_add_bos(m.vocab) && llama_vocab_bos(m.vocab) == LLAMA_TOKEN_NULL) &&
            !(llama_vocab_get_add_eos(m.vocab) && llama_vocab_eos(m.vocab) == LLAMA_TOKEN_NULL) &&
            !(llama_vocab_get_add_sep(m.vocab) && llama_vocab_sep(m.vocab) == LLAMA_TOKEN_NULL);

        const int32_t res = llama_tokenize(m.vocab, text ? text : "", n_text, tokens, n_max, add, parse_special != 0);
        if (res == INT32_MIN) {
            equip_fail(EQUIP_ERR_USAGE, "the text has too many tokens");
        }
        return res;
    });
}

int32_t equip_token_piece(equip_model * model, int32_t token, int special, char * buf, int32_t n_buf) {
    return equip_guard(FAILED, [&]() -> int32_t {
        const auto & m = check_vocab(model);
        check_token(m, token);
        if (n_buf < 0 || (n_buf > 0 && !buf)) {
            equip_fail(EQUIP_ERR_USAGE, "a length is negative or a buffer is missing");
        }
        return llama_token_to_piece(m.vocab, token, buf, n_buf, /*lstrip =*/ 0, special != 0);
    });
}

const char * equip_control_tokens(equip_model * model) {
    return equip_guard((const char *) nullptr, [&] {
        const auto & m = check_vocab(model);

        common_json res = common_json::array();
        for (int32_t i = 0; i < llama_vocab_n_tokens(m.vocab); ++i) {
            const char * text = llama_vocab_get_text(m.vocab, i);
            if ((llama_vocab_get_attr(m.vocab, i) & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN)) && text && *text) {
                res.push_back(text);
            }
        }
        return equip_return(res.dump_safe());
    });
}

int equip_token_is_eog(equip_model * model, int32_t token) {
    return equip_guard(0, [&]() -> int {
        const auto & m = check_vocab(model);
        check_token(m, token);
        return llama_vocab_is_eog(m.vocab, token) ? 1 : 0;
    });
}
