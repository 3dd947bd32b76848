#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(FNAC_BF16)
#include "cpu/amx_instructions.h"
#endif

namespace fnac {
namespace {

// In the order of preference, the best one last.
std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> tables{&portable_kernels()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return tables;
    tables.push_back(&avx2_kernels());
#if defined(FNAC_VNNI)
    if (__builtin_cpu_supports("avxvnni")) tables.push_back(&avxvnni_kernels());
#endif
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return tables;
    tables.push_back(&avx512_kernels());
#if defined(FNAC_VNNI)
    if (!__builtin_cpu_supports("avx512vnni")) return tables;
    tables.push_back(&avx512vnni_kernels());
#endif
#if defined(FNAC_BF16)
    if (!__builtin_cpu_supports("avx512bf16")) return tables;
    // AMD's processors make products of bfloat16 as fast as those of 16-bit integers, Intel's slower.
    tables.insert(__builtin_cpu_is("amd") ? tables.end() : tables.end() - 1, &avx512bf16_kernels());
    if (tiles::usable()) tables.push_back(&amx_kernels());
#endif
#endif
    return tables;
}

const Kernels* choose() {
    const std::vector<const Kernels*> tables = usable();
    const char* wish = std::getenv("FNAC_CPU_ISA");
    if (wish == nullptr || *wish == '\0') return tables.back();
    std::string names;
    for (const Kernels* table : tables) {
        if (std::string(table->name) == wish) return table;
        names.append(names.empty() ? "" : ", ").append(table->name);
    }
    std::string message = "FNAC_CPU_ISA is '";
    throw std::runtime_error(message.append(wish).append("'; this machine and build run ").append(names));
}

}  // namespace

const Kernels& kernels() {
    static const Kernels* const table = choose();
    return *table;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* table : usable()) names.emplace_back(table->name);
    return names;
}

}  // namespace fnac
