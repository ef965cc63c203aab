package object

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"cloud.google.com/go/storage"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/aws/aws-sdk-go-v2/aws"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go/middleware"
	"github.com/googleapis/gax-go/v2"
	"gocloud.dev/blob"
	"gocloud.dev/blob/azureblob"
	"gocloud.dev/blob/gcsblob"
	"gocloud.dev/blob/s3blob"
	"gocloud.dev/gcp"
	"golang.org/x/oauth2/google"
	"google.golang.org/api/option"
)

// The libraries' own retries are off for reading: package cache has one bound for
// all of them. For writing they are on: they send a part of a file again, and not
// all of it.

// defaultRegion signs requests where no region is configured; stores that are
// not Amazon's take it.
const defaultRegion = "us-east-1"

func openS3(ctx context.Context, name string, c Config, secret []byte, client *http.Client, pause time.Duration) (*blob.Bucket, error) {
	opts := []func(*awsconfig.LoadOptions) error{
		awsconfig.WithRequestChecksumCalculation(aws.RequestChecksumCalculationWhenRequired),
		awsconfig.WithResponseChecksumValidation(aws.ResponseChecksumValidationWhenRequired),
	}
	if c.Region != "" {
		opts = append(opts, awsconfig.WithRegion(c.Region))
	}
	if secret != nil {
		// The file that was checked, and none besides: variables of the environment
		// would come first.
		p, err := awsconfig.LoadSharedConfigProfile(ctx, awsconfig.DefaultSharedConfigProfile, func(o *awsconfig.LoadSharedConfigOptions) {
			o.CredentialsFiles, o.ConfigFiles = []string{c.CredentialsFile}, []string{}
		})
		if err != nil {
			return nil, fmt.Errorf("read credentials: %w", err)
		}
		if !p.Credentials.HasKeys() {
			return nil, errors.New("read credentials: no keys in profile [default]")
		}
		opts = append(opts, awsconfig.WithCredentialsProvider(credentials.StaticCredentialsProvider{Value: p.Credentials}))
	}
	cfg, err := awsconfig.LoadDefaultConfig(ctx, opts...)
	if err != nil {
		return nil, err
	}
	s := s3.NewFromConfig(cfg, func(o *s3.Options) {
		o.HTTPClient, o.UsePathStyle, o.Retryer = client, c.PathStyle, aws.NopRetryer{}
		if pause > 0 {
			o.Retryer = partRetries(pause)
		}
		if c.Endpoint != "" {
			o.BaseEndpoint = aws.String(c.Endpoint)
		}
		if o.Region == "" {
			o.Region = defaultRegion
		}
		o.APIOptions = append(o.APIOptions, func(s *middleware.Stack) error { return s.Initialize.Add(uploadsHaveIDs, middleware.Before) })
	})
	return s3blob.OpenBucket(ctx, s, name, &s3blob.Options{RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired})
}

// uploadsHaveIDs refuses an answer that begins an upload of parts and does not name it.
// The library reads the name in a goroutine of its own, where a panic ends the agent.
var uploadsHaveIDs = middleware.InitializeMiddlewareFunc("UploadsHaveIDs", func(ctx context.Context, in middleware.InitializeInput, next middleware.InitializeHandler) (middleware.InitializeOutput, middleware.Metadata, error) {
	out, meta, err := next.HandleInitialize(ctx, in)
	if o, ok := out.Result.(*s3.CreateMultipartUploadOutput); ok && err == nil && aws.ToString(o.UploadId) == "" {
		return middleware.InitializeOutput{}, meta, errAnswer
	}
	return out, meta, err
})

func openGCS(ctx context.Context, name string, c Config, secret []byte, client *http.Client, pause time.Duration) (*blob.Bucket, error) {
	scope := storage.ScopeReadOnly
	if pause > 0 {
		scope = storage.ScopeReadWrite
	}
	var creds *google.Credentials
	var err error
	if secret != nil {
		creds, err = google.CredentialsFromJSONWithType(ctx, secret, google.ServiceAccount, scope)
	} else {
		creds, err = google.FindDefaultCredentials(ctx, scope)
	}
	if err != nil {
		return nil, fmt.Errorf("read credentials: %w", err)
	}
	authorized, err := gcp.NewHTTPClient(client.Transport, gcp.CredentialsTokenSource(creds))
	if err != nil {
		return nil, err
	}
	authorized.CheckRedirect = client.CheckRedirect
	var o gcsblob.Options
	if c.Endpoint != "" {
		// Lists, uploads and deletions go below it (JSON API), reads to its host (XML API).
		at, err := url.JoinPath(c.Endpoint, "storage/v1/")
		if err != nil {
			return nil, err
		}
		o.ClientOptions = append(o.ClientOptions, option.WithEndpoint(at))
	}
	b, err := gcsblob.OpenBucket(ctx, authorized, name, &o)
	if err != nil {
		return nil, err
	}
	var store *storage.Client
	if !b.As(&store) {
		return nil, errors.Join(errors.New("the library's client is not the one expected"), b.Close())
	}
	if pause == 0 {
		store.SetRetry(storage.WithPolicy(storage.RetryNever))
	} else {
		// An object whose answer was lost is made again, the same. An upload has no bound
		// but putStall; the library would not send again after a cut connection unless told.
		store.SetRetry(storage.WithPolicy(storage.RetryAlways), storage.WithMaxAttempts(putTries), storage.WithErrorFunc(storage.ShouldRetry),
			storage.WithBackoff(gax.Backoff{Initial: min(pause, time.Second), Max: pause}))
	}
	return b, nil
}

func openAzure(ctx context.Context, name string, c Config, secret []byte, client *http.Client, pause time.Duration) (*blob.Bucket, error) {
	client.Transport = lending{client.Transport}
	options := azcore.ClientOptions{Transport: client, Retry: policy.RetryOptions{MaxRetries: -1}}
	if pause > 0 {
		options.Retry.MaxRetries, options.Retry.MaxRetryDelay = putTries-1, pause
	}
	connection := string(secret)
	if connection == "" && c.Endpoint == "" {
		connection = os.Getenv("AZURE_STORAGE_CONNECTION_STRING")
	}
	var at *container.Client
	var err error
	if connection != "" {
		at, err = container.NewClientFromConnectionString(connection, name, &container.ClientOptions{ClientOptions: options})
	} else {
		if c.Endpoint == "" {
			return nil, errors.New("want an endpoint, such as https://account.blob.core.windows.net, or a connection string")
		}
		var u string
		var identity *azidentity.DefaultAzureCredential
		if u, err = url.JoinPath(c.Endpoint, name); err != nil {
			return nil, err
		}
		if identity, err = azidentity.NewDefaultAzureCredential(nil); err != nil {
			return nil, fmt.Errorf("find credentials: %w", err)
		}
		at, err = container.NewClient(u, identity, &container.ClientOptions{ClientOptions: options})
	}
	if err != nil {
		return nil, err
	}
	// A connection string has an endpoint too. A shared access signature stands in
	// its query.
	base, _, _ := strings.Cut(at.URL(), "?")
	if err := checkEndpoint(base); err != nil {
		return nil, err
	}
	return azureblob.OpenBucket(ctx, at, nil)
}
