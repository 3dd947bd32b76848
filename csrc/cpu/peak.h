// The processor's arithmetic limits, measured: what the benchmarks divide by.
#pragma once

namespace fnac {

// float32 multiply-adds from registers, in flop/s over all threads, with the processor's widest vectors.
double peak_fma(int threads, int milliseconds);

// bfloat16 tile products (AMX), in flop/s over all threads; 0 where the processor or the system has none.
double peak_amx(int threads, int milliseconds);

}  // namespace fnac
