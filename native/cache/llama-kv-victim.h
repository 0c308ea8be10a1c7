#pragma once

#include <cstdint>
#include <memory>

// the rule of a policy: which of the evictable tokens of one sequence goes next
// protection is not its business: it hears of tokens that are neither sinks nor pinned nor recent, and of no others
class llama_kv_victim {
public:
    virtual ~llama_kv_victim() = default;

    virtual std::unique_ptr<llama_kv_victim> clone() const = 0;

    virtual void clear() = 0;

    virtual void add   (uint32_t slot, int32_t pos) = 0;
    virtual void remove(uint32_t slot, int32_t pos) = 0;

    // a slot; called only while there is an evictable token
    virtual uint32_t next() const = 0;
};

// a rule that is copied with its owner; may hold none
class llama_kv_victim_ptr {
public:
    llama_kv_victim_ptr(std::unique_ptr<llama_kv_victim> rule) : rule(std::move(rule)) {}

    llama_kv_victim_ptr(const llama_kv_victim_ptr & other) : rule(other.rule ? other.rule->clone() : nullptr) {}
    llama_kv_victim_ptr & operator=(const llama_kv_victim_ptr & other) {
        rule = other.rule ? other.rule->clone() : nullptr;
        return *this;
    }

    explicit operator bool() const { return rule != nullptr; }

    llama_kv_victim * operator->() const { return rule.get(); }

private:
    std::unique_ptr<llama_kv_victim> rule;
};

// splitmix64 (Steele, Lea, Flood 2014): the same number for the same x in every run
uint64_t llama_kv_draw(uint64_t x);

// `random`: a uniform sample of what has been read, the baseline that any score must beat
// each token draws a number when it is written, and the lowest one goes (reservoir sampling: Vitter 1985, algorithm R, has
//   the same distribution); O(log budget) per token
std::unique_ptr<llama_kv_victim> llama_kv_victim_random();
