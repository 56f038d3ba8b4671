/* SPDX-License-Identifier: Apache-2.0 */
#include "base/page.h"

const uint8_t zero_page[PAGE_SIZE_MAX] __attribute__((aligned(PAGE_SIZE_MAX)));
