//! The `ringraft` program. See the library of the same package.

fn main() -> std::process::ExitCode {
    ringraft_bench::cli::main()
}
