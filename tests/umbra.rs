// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra`, for the tests beside this file.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main()
}
