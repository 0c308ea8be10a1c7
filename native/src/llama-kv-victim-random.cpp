#include "llama-kv-victim.h"

#include <set>
#include <utility>

// splitmix64 (Steele, Lea, Flood 2014): the same number for the same position in every run
static uint64_t draw(int32_t pos) {
    uint64_t z = ((uint64_t) pos + 1)*0x9e3779b97f4a7c15ull;

    z = (z ^ (z >> 30))*0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27))*0x94d049bb133111ebull;

    return z ^ (z >> 31);
}

namespace {

class victim_random : public llama_kv_victim {
public:
    std::unique_ptr<llama_kv_victim> clone() const override { return std::make_unique<victim_random>(*this); }

    void clear() override { order.clear(); }

    void add   (uint32_t slot, int32_t pos) override { order.insert({ draw(pos), slot }); }
    void remove(uint32_t slot, int32_t pos) override { order.erase ({ draw(pos), slot }); }

    uint32_t next() const override { return order.begin()->second; }

private:
    std::set<std::pair<uint64_t, uint32_t>> order;
};

}

std::unique_ptr<llama_kv_victim> llama_kv_victim_random() {
    return std::make_unique<victim_random>();
}
