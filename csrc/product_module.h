// The part of the Python module that multiplies.
#pragma once

#include <nanobind/nanobind.h>

namespace secateur {

void bind_products(nanobind::module_& m);

}  // namespace secateur
