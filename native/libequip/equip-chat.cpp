#include "equip-internal.h"

#include "chat.h"
#include "json.h"

struct equip_chat_template {
    std::string               source; // empty: the model's own
    common_chat_templates_ptr parsed;
};

// upstream's exception for a template that does not parse loses its text on the way: parse again to get it
[[noreturn]] static void fail_template(const std::string & source) {
    std::string why;
    try {
        common_chat_template(source, "", "");
    } catch (const std::exception & err) {
        why = std::string(": ") + err.what();
    }
    equip_fail(EQUIP_ERR_USAGE, "the chat template cannot be parsed%s", why.c_str());
}

static common_json parse_json(const char * text, const char * what) {
    equip_check_json_depth(text, equip_format("the %s are", what).c_str());
    try {
        return common_json::parse(text);
    } catch (const std::exception & err) {
        equip_fail(EQUIP_ERR_USAGE, "the %s are not valid JSON: %s", what, err.what());
    }
}

// "Unable to generate parser ... While executing ... Error: Jinja Exception: x" -> "Jinja Exception: x"
static std::string strip_context(const std::string & what) {
    const size_t at = what.rfind("Error: ");
    return at == std::string::npos ? what : what.substr(at + 7);
}

const char * equip_chat_render(equip_model * model, const char * messages, const char * tools, const char * chat_template, int add_generation_prompt) {
    return equip_guard((const char *) nullptr, [&] {
        if (!model || !messages) {
            equip_fail(EQUIP_ERR_USAGE, "no messages are given");
        }
        auto & m = *model->state;
        if (llama_vocab_type(m.vocab) == LLAMA_VOCAB_TYPE_NONE) {
            equip_fail(EQUIP_ERR_UNSUPPORTED, "the model has no tokenizer");
        }

        common_chat_templates_inputs inputs;
        try {
            inputs.messages = common_chat_msgs_parse_oaicompat(parse_json(messages, "messages"));
            if (tools) {
                inputs.tools = common_chat_tools_parse_oaicompat(parse_json(tools, "tools"));
            }
        } catch (const std::exception & err) {
            equip_fail(EQUIP_ERR_USAGE, "%s", err.what());
        }
        inputs.add_generation_prompt = add_generation_prompt != 0;

        const std::string source = chat_template ? chat_template : "";

        std::lock_guard<std::mutex> lock(m.chat_mutex);

        equip_abort_scope asserts;

        if (!m.chat || m.chat->source != source) {
            const char * own = llama_model_chat_template(m.model, nullptr);
            equip_check_template_depth(source.empty() ? (own ? own : "") : source.c_str());
            try {
                m.chat.reset(new equip_chat_template{ source, common_chat_templates_init(m.model, source) });
            } catch (const std::exception &) {
                fail_template(source.empty() && own ? own : source);
            }
        }

        try {
            const std::string prompt = common_chat_templates_apply(m.chat->parsed.get(), inputs).prompt;
            if (prompt.find('\0') != std::string::npos) {
                throw std::runtime_error("a zero byte, which would end the prompt");
            }
            return equip_return(prompt);
        } catch (const std::exception & err) {
            equip_fail(EQUIP_ERR_USAGE, "the chat template refuses these messages: %s", strip_context(err.what()).c_str());
        }
    });
}
