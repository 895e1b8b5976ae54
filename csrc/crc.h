// CRC-32 (zlib's), for machines that multiply without carries. Others have zlib.
#pragma once

#include <cstdint>

namespace secateur {

// The CRC-32 of what `value` is the CRC-32 of, and these bytes after it. Only where has_clmul().
uint32_t crc32_clmul(const uint8_t* p, uint64_t n, uint32_t value);

// Whether this build and this processor can.
bool has_clmul();

}  // namespace secateur
