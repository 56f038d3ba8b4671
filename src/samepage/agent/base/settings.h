/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the service wants: its WELCOME. The agent thread writes it once for each service that it joins. Everybody reads
 * it without a lock: each field is a word, and any mixture of two services' settings is as good as either.
 */
#ifndef SAMEPAGE_BASE_SETTINGS_H
#define SAMEPAGE_BASE_SETTINGS_H

#include "base/page.h"
#include "base/wire.h"

extern struct sp_welcome settings;

#endif
