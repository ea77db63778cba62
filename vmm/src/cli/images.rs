// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra images`: the bundled guests.

use super::Format;
use crate::causes::answer;
use anyhow::{Context, Result};
use clap::Args;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::ExitCode;

/// List the bundled guests, or write them to files.
///
/// Every guest is an ordinary static Linux program: extracted, it also runs without umbra, and must give the same answers.
#[derive(Debug, Args)]
pub(super) struct ImagesArgs {
    /// Write each guest as an executable file to this folder (made if it is missing), and print the paths.
    #[arg(long, value_name = "DIR")]
    extract: Option<PathBuf>,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

impl ImagesArgs {
    fn format(&self) -> Format {
        if self.json { Format::Json } else { Format::Text }
    }
}

pub(super) fn run(args: &ImagesArgs) -> Result<ExitCode> {
    let mut rows = Vec::new();
    if let Some(dir) = &args.extract {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    for image in guest_images::all() {
        let path = args.extract.as_ref().map(|dir| dir.join(image.name));
        if let Some(path) = &path {
            fs::write(path, image.elf).with_context(|| format!("cannot write {}", path.display()))?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))
                .with_context(|| format!("cannot make {} executable", path.display()))?;
        }
        rows.push((image, path));
    }
    let text = match args.format() {
        Format::Json => {
            let rows: Vec<_> = rows
                .iter()
                .map(|(image, path)| {
                    serde_json::json!({
                        "name": image.name, "summary": image.summary, "usage": image.usage,
                        "bytes": image.elf.len(), "path": path,
                    })
                })
                .collect();
            serde_json::to_string_pretty(&rows)? + "\n"
        }
        Format::Text => rows
            .iter()
            .map(|(image, path)| match path {
                Some(path) => format!("{}\n", path.display()),
                None => format!("{:<10} {}\n{:<10} {}\n", image.name, image.summary, "", image.usage),
            })
            .collect(),
    };
    answer(text)?;
    Ok(ExitCode::SUCCESS)
}
