/* SPDX-License-Identifier: Apache-2.0 */
#include "base/settings.h"

struct sp_welcome settings = {.section = 64, .reserve = 16 << 20};
